"""Tools and the assistant's calls of them, in the form that chat templates read: OpenAI's, with arguments as objects.

Read are: `tool_calls`; OpenAI's older `functions` and `function_call`; ShareGPT's `function_call` turns, whose value is
the JSON of a call; tools without the `function` around them. Arrow (Parquet, save_to_disk) gives every object of a
column the same fields and null where a row had none. So nulls in tools and calls of such files are taken as absent,
but for an argument that the called tool requires.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from onecard.data.files import BadRow, describe


def check_text(field: str, value: Any, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise BadRow(field, f"{field} must be a string", describe(value))
    if not empty and not value.strip():
        raise BadRow(field, f"{field} must not be empty", repr(value[:20]))
    if "\x00" in value:
        raise BadRow(field, f"{field} must be text", f"a NUL character at {value.index(chr(0))}")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise BadRow(field, f"{field} must be valid Unicode", "half of a surrogate pair")
    return value


def is_absent(value: Any) -> bool:
    """Whether a field that a row may leave out has what Arrow and SDKs write where there is nothing."""
    return value is None or value == [] or value == {} or (isinstance(value, str) and not value.strip())


def parsed(field: str, value: Any, must: str) -> Any:
    """A value, or what its JSON text holds."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise BadRow(field, must, describe(value)) from None


def without_united_nulls(row: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """A row of an Arrow file less the nulls inside its columns, and how many arguments of calls went with them.

    What is text in the row, such as arguments in JSON, is as it was.
    """
    required, taken = required_arguments(row), 0

    def pruned(value: Any, kept: Any = ()) -> Any:
        nonlocal taken
        if isinstance(value, list):
            return [pruned(each) for each in value]
        if not isinstance(value, dict):
            return value
        made = {key: pruned(each) for key, each in value.items() if each is not None or key in kept}
        arguments = value.get("arguments")
        if isinstance(arguments, dict):
            made["arguments"] = pruned(arguments, required.get(value.get("name"), ()))
            taken += len(arguments) - len(made["arguments"])
        return made

    return {key: pruned(value) for key, value in row.items()}, taken


def required_arguments(row: dict[str, Any]) -> dict[Any, Any]:
    """name -> the arguments that the row's tool of that name requires."""
    try:
        tools = check_tools(row) or []
    except BadRow:  # told when the row is read
        return {}
    found = {}
    for function in (tool.get("function") for tool in tools):
        parameters = function.get("parameters") if isinstance(function, dict) else None
        if isinstance(function, dict) and isinstance(parameters, dict):
            found[function.get("name")] = parameters.get("required") or ()
    return found


def check_tools(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """A row's tools, from `tools` or `functions`: a list of objects, or the JSON text of one."""
    given = [key for key in ("tools", "functions") if not is_absent(row.get(key))]
    if len(given) == 2:
        raise BadRow("functions", "a row must have tools or functions", "both")
    if not given:
        return None
    field = given[0]
    tools = parsed(field, row[field], f"{field} must be a list, or the JSON of one")
    if is_absent(tools):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow(field, f"{field} must be a list of objects", describe(tools))
    check_strings(field, tools)
    return [as_tool(tool) for tool in tools]


def as_tool(tool: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's form of a tool that is given as its function alone."""
    bare = isinstance(tool.get("name"), str) and "function" not in tool and tool.get("type") in (None, "function")
    return {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}} if bare else tool


def check_tool_calls(field: str, calls: Any, role: str) -> list[dict[str, Any]]:
    """An assistant's calls; arguments become objects, for templates write a string as a quoted string."""
    if role != "assistant":
        raise BadRow(field, "only the assistant may call tools", f"role {role}")
    calls = parsed(field, calls, f"{field} must be a list of calls, or the JSON of one")
    if not isinstance(calls, list) or not calls:
        raise BadRow(field, "tool_calls must be a list of calls", describe(calls))
    return [check_call(f"{field}[{i}]", call) for i, call in enumerate(calls)]


def check_call(field: str, call: Any) -> dict[str, Any]:
    """A call in OpenAI's form; one of a name and arguments alone is taken for its function."""
    if isinstance(call, dict) and "function" not in call and "name" in call:
        function = {key: value for key, value in call.items() if key in ("name", "arguments")}
        call = {key: value for key, value in call.items() if key not in function} | {"function": function}
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow(f"{field}.function", "a call must have a function with a name", describe(call))
    check_text(f"{field}.function.name", function["name"])
    arguments = {} if is_absent(function.get("arguments")) else function["arguments"]
    arguments = parsed(f"{field}.function.arguments", arguments, "arguments must be JSON")
    if not isinstance(arguments, dict):
        raise BadRow(f"{field}.function.arguments", "arguments must be an object", describe(arguments))
    check_strings(field, call)
    check_strings(f"{field}.function.arguments", arguments)
    return {"type": "function", **call, "function": {**function, "arguments": arguments}}


def bare_calls(field: str, value: Any) -> list[dict[str, Any]]:
    """Calls given as functions alone, one or a list, or the JSON text of that: {"name": ..., "arguments": ...}."""
    value = parsed(field, value, "a function call must be the JSON of its name and arguments")
    functions = value if isinstance(value, list) else [value]
    if not functions:
        raise BadRow(field, "a function call must have a name and arguments", describe(value))
    for function in functions:
        if not isinstance(function, dict) or "name" not in function:
            raise BadRow(field, "a function call must have a name and arguments", describe(function))
    return [{"type": "function", "function": function} for function in functions]


def check_strings(field: str, value: Any) -> None:
    """Every string and key of a JSON value must be text."""
    for name, text in strings_in(field, value):
        check_text(name, text, empty=True)


def strings_in(field: str, value: Any) -> Iterator[tuple[str, str]]:
    """(field, text) of every string and key in a JSON value."""
    rest = [(field, value)]
    while rest:  # not recursion: arguments may be nested deep
        field, value = rest.pop()
        if isinstance(value, str):
            yield field, value
        elif isinstance(value, dict):
            rest += [(field, key) for key in value] + [(f"{field}.{key}", value[key]) for key in value]
        elif isinstance(value, list):
            rest += [(f"{field}[{k}]", each) for k, each in enumerate(value)]
