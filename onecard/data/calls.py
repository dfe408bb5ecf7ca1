"""Convert tools and tool calls to the form that chat templates read: OpenAI's, with arguments as objects.

The inputs are `tool_calls`; OpenAI's older `functions` and `function_call`; ShareGPT's `function_call` turns, whose
value is the JSON of a call; and tools without the enclosing `function`. Arrow (Parquet, save_to_disk) stores the same
fields in every object of a column, with null where a row had none. So null fields inside the columns of such files
count as absent, except an argument that the called tool requires.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from onecard.data.files import BadRow, describe

SURROGATES = re.compile("[\ud800-\udfff]")


def check_text(field: str, value: Any, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise BadRow(field, f"{field} must be a string", describe(value))
    if not empty and not value.strip():
        raise BadRow(field, f"{field} must not be empty", repr(value[:20]))
    if "\x00" in value:
        raise BadRow(field, f"{field} must be text", f"a NUL character at {value.index(chr(0))}")
    if SURROGATES.search(value):
        raise BadRow(field, f"{field} must be valid Unicode", "half of a surrogate pair")
    return value


def is_absent(value: Any) -> bool:
    """Whether an optional field is empty: null, [], {} or blank text, as Arrow and SDKs write for an absent value."""
    return value is None or value == [] or value == {} or (isinstance(value, str) and not value.strip())


def parsed(field: str, value: Any, must: str) -> Any:
    """Return the value; a string is parsed as JSON. Raises BadRow with `must` if it is not JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise BadRow(field, must, describe(value)) from None


def without_united_nulls(row: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Remove the null fields inside the columns of an Arrow row. Also return the number of removed arguments of calls.

    Text in the row, such as arguments as JSON, does not change.
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
    """Map the name of each of the row's tools to the arguments that the tool requires."""
    try:
        tools = check_tools(row) or []
    except BadRow:  # reported when the row is read
        return {}
    found = {}
    for function in (tool.get("function") for tool in tools):
        parameters = function.get("parameters") if isinstance(function, dict) else None
        if isinstance(function, dict) and isinstance(parameters, dict):
            found[function.get("name")] = parameters.get("required") or ()
    return found


def check_tools(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Return a row's tools from `tools` or `functions`: a list of objects, or its JSON text. None if there are none."""
    given = [key for key in ("tools", "functions") if not is_absent(row.get(key))]
    if len(given) == 2:
        raise BadRow("functions", "a row must have either tools or functions, not both", "both")
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
    """Convert a tool that is only its function to OpenAI's form. Other tools do not change."""
    bare = isinstance(tool.get("name"), str) and "function" not in tool and tool.get("type") in (None, "function")
    return {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}} if bare else tool


def check_tool_calls(field: str, calls: Any, role: str) -> list[dict[str, Any]]:
    """Check an assistant's calls. Arguments become objects, because templates write a string with quotes."""
    if role != "assistant":
        raise BadRow(field, "only the assistant may call tools", f"role {role}")
    calls = parsed(field, calls, f"{field} must be a list of calls, or the JSON of one")
    if not isinstance(calls, list) or not calls:
        raise BadRow(field, "tool_calls must be a list of calls", describe(calls))
    return [check_call(f"{field}[{i}]", call) for i, call in enumerate(calls)]


def check_call(field: str, call: Any) -> dict[str, Any]:
    """Check a call and convert it to OpenAI's form. The name and arguments of a bare call become its function."""
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
    """Convert one function {"name": ..., "arguments": ...}, a list of functions, or their JSON text to calls."""
    value = parsed(field, value, "a function call must be the JSON of its name and arguments")
    functions = value if isinstance(value, list) else [value]
    if not functions:
        raise BadRow(field, "a function call must have a name and arguments", describe(value))
    for function in functions:
        if not isinstance(function, dict) or "name" not in function:
            raise BadRow(field, "a function call must have a name and arguments", describe(function))
    return [{"type": "function", "function": function} for function in functions]


def check_strings(field: str, value: Any) -> None:
    """Raise BadRow if a string or key of a JSON value is not valid text."""
    for name, text in strings_in(field, value):
        check_text(name, text, empty=True)


def strings_in(field: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield (field, text) of every string and key in a JSON value."""
    rest = [(field, value)]
    while rest:  # no recursion: arguments may be nested too deep for it
        field, value = rest.pop()
        if isinstance(value, str):
            yield field, value
        elif isinstance(value, dict):
            rest += [(field, key) for key in value] + [(f"{field}.{key}", value[key]) for key in value]
        elif isinstance(value, list):
            rest += [(f"{field}[{k}]", each) for k, each in enumerate(value)]
