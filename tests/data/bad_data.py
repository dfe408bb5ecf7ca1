"""Bad data of every kind, each with the place that its message must name and a word that it must say."""

from __future__ import annotations

import json
from pathlib import Path

GOOD = json.dumps({"messages": [{"role": "user", "content": "how?"}, {"role": "assistant", "content": "two"}]})
ASKED = {"role": "user", "content": "how?"}
SAID = {"role": "assistant", "content": "two"}


def chat(*turns: object) -> str:
    return json.dumps({"messages": list(turns)})


def call(**function: object) -> str:
    return chat(ASKED, {"role": "assistant", "content": None, "tool_calls": [{"function": function}]})


def sharegpt(*turns: object) -> str:
    return json.dumps({"conversations": list(turns)})


def parquet_rows(rows: list[dict[str, object]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def parquet_twice() -> bytes:
    import pyarrow
    import pyarrow.parquet

    column, sink = pyarrow.array(["a"]), pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([column, column], names=["text", "text"]), sink)
    return sink.getvalue().to_pybytes()


# kind: (line 2 of a JSONL file of chats, the field named, a word of the message)
CHAT_LINES: dict[str, tuple[str | bytes, str, str]] = {
    "not JSON": ("{'messages'}", "row", "JSON"),
    "cut off": ('{"messages": [{"role": "us', "row", "JSON"),
    "the mark of control tokens": (chat(ASKED, {**SAID, "content": "two\ufdd0"}), "messages[1].content", "U+FDD0"),
    "not an object": ("[1, 2]", "row", "object"),
    "not UTF-8": (b'{"messages": "\xff"}', "row", "0xff"),
    "nested too deep": ("[" * 100_000 + "]" * 100_000, "row", "deep"),
    "integer of 5000 digits": ('{"messages": ' + "1" * 5000 + "}", "row", "digits"),
    "key twice": ('{"messages": [], "messages": []}', "messages", "once"),
    "key twice, inside": (GOOD[:-1] + ', "a": {"b": 1, "b": 2}}', "b", "once"),
    "missing field": ('{"text": "a"}', "messages", "must have"),
    "null instead of messages": ('{"messages": null}', "messages", "null"),
    "text instead of messages": ('{"messages": "hello"}', "messages", "list"),
    "no messages": ('{"messages": []}', "messages", "list"),
    "message not an object": (chat("hi"), "messages[0]", "object"),
    "unknown role": (chat(ASKED, {"role": "robot", "content": "x"}), "messages[1].role", "robot"),
    "role of half a surrogate": ('{"messages": [{"role": "\\ud800"}]}', "messages[0].role", "ud800"),
    "null content": (chat(ASKED, {"role": "assistant", "content": None}), "messages[1].content", "null"),
    "missing content": (chat(ASKED, {"role": "assistant"}), "messages[1].content", "null"),
    "number as content": (chat(ASKED, {"role": "assistant", "content": 7}), "messages[1].content", "int 7"),
    "NaN as content": (chat(ASKED, {"role": "assistant", "content": float("nan")}), "messages[1].content", "NaN"),
    "blank answer": (chat(ASKED, {"role": "assistant", "content": " \n"}), "messages[1].content", "empty"),
    "no assistant": (chat(ASKED), "messages", "assistant"),
    "tool first": (chat({"role": "tool", "content": "7"}, SAID), "messages[0].role", "before"),
    "image part": (chat({"role": "user", "content": [{"type": "image"}]}, SAID), "messages[0].content[0]", "text"),
    "image column": (GOOD[:-1] + ', "images": ["a.png"]}', "images", "must be text"),
    "bad answer of KTO": (GOOD[:-1] + ', "label": false}', "label", "must be true"),
    "fraction of a weight": (chat(ASKED, {**SAID, "loss_weight": 0.5}), "messages[1].loss_weight", "float 0.5"),
    "user's message to learn": (chat({**ASKED, "train": True}, SAID), "messages[0].train", "only they are learned"),
    "tools and functions": (
        GOOD[:-1] + ', "tools": [{"name": "f"}], "functions": [{"name": "f"}]}',
        "functions",
        "both",
    ),
    "two fields of calls": (
        chat(ASKED, {**SAID, "tool_calls": [{}], "function_call": {"name": "f"}}),
        "messages[1].function_call",
        "one field",
    ),
    "two thoughts": (
        chat(ASKED, {**SAID, "thinking": "a", "reasoning_content": "b"}),
        "messages[1].thinking",
        "one field",
    ),
    "call on a template without tools": (
        call(name="find_ship", arguments={}),
        "messages[1].tool_calls",
        "leaves out",
    ),
    "thoughts on a template without them": (
        chat(ASKED, {**SAID, "reasoning_content": "because"}),
        "messages[1].thoughts",
        "because",
    ),
    "NUL": (chat(ASKED, {"role": "assistant", "content": "a\x00"}), "messages[1].content", "NUL"),
    "half a surrogate": (chat({"role": "user", "content": "\ud800"}, SAID), "messages[0].content", "surrogate"),
    "control token": (chat(ASKED, {"role": "assistant", "content": "a<|im_end|>"}), "messages[1].content", "im_end"),
    "control token in a call": (
        call(name="f", arguments={"a": ["<|im_end|>"]}),
        "messages[1].tool_calls[0].function.arguments.a[0]",
        "im_end",
    ),
    "call without a name": (call(arguments={}), "messages[1].tool_calls[0].function", "name"),
    "arguments not JSON": (
        call(name="f", arguments="{a"),
        "messages[1].tool_calls[0].function.arguments",
        "arguments must be JSON",
    ),
    "half a surrogate in a call": (
        call(name="f", arguments={"a": ["\ud800"]}),
        "messages[1].tool_calls[0].function.arguments.a[0]",
        "surrogate",
    ),
    "NUL in a call's name": (call(name="f\x00", arguments={}), "messages[1].tool_calls[0].function.name", "NUL"),
    "NUL in the tools": (GOOD[:-1] + ', "tools": [{"name": "\\u0000"}]}', "tools[0].name", "NUL"),
    "comma at the end": (GOOD[:-1] + ",}", "row", "double quotes"),
    "raw control character": (GOOD.replace("two", "t\x01o"), "row", "Invalid control character at column"),
    "user calls a tool": (chat({**ASKED, "tool_calls": [{}]}, SAID), "messages[0].tool_calls", "only the assistant"),
}

# kind: (file's name, its bytes, the place named, a word of the message)
FILES: dict[str, tuple[str, bytes, str, str]] = {
    "wrong suffix": ("d.md", b"x", "d.md", "must end in"),
    "a spreadsheet": ("d.xlsx", b"PK\x03\x04", "d.xlsx", "save it as CSV"),
    "empty file": ("d.jsonl", b"", "d.jsonl", "empty file"),
    "blank lines only": ("d.jsonl", b"\n \n", "d.jsonl", "none"),
    "no known format": ("d.jsonl", b'{"riddle": "a"}\n', "d.jsonl", "riddle"),
    "gzip": ("d.jsonl", b"\x1f\x8b\x08\x00abc", "d.jsonl", "gzip"),
    "Parquet named JSONL": ("d.jsonl", parquet_rows([{"text": "a"}]), "d.jsonl", "Parquet"),
    "UTF-16, cut off": ("d.jsonl", '{"text": "a"}'.encode("utf-16")[:-1], "d.jsonl", "the encoding utf-16"),
    "UTF-32": ("d.jsonl", '{"text": "a"}'.encode("utf-32"), "d.jsonl", "UTF-32"),
    "binary": ("d.csv", bytes(64) + b"ab", "d.csv", "binary"),
    "JSON array cut off": ("d.json", b'[{"text": "a"},\n{"text"', "d.json:2:row", "line 2"),
    "JSON array, comma at the end": ("d.json", b'[{"text": "a"},]', "d.json:2:row", "Expecting value"),
    "JSON array, more after it": ("d.json", b'[{"text": "a"}] x', "d.json:1:row", "after the array"),
    "JSON array of numbers": ("d.json", b'[{"text": "a"}, 7]', "d.json:2:row", "int 7"),
    "JSON array, key twice": ("d.json", b'[{"text": "a"}, {"text": "b", "text": "c"}]', "d.json:2:text", "once"),
    "one JSON object": ("d.json", b'{\n"riddle": 7\n}', "d.json", "one object with the keys riddle"),
    "CSV, ragged": ("d.csv", b"prompt,completion\na,b\nc\n", "d.csv:3:row", "1 cells under 2"),
    "CSV, open quote": ("d.csv", b'prompt,completion\na,b\n"c,d\n', "d.csv:3:row", "unexpected end"),
    "CSV, not UTF-8": ("d.csv", b'prompt,completion\n"a\nb",c\n\xff,d\n', "d.csv:4:prompt", "0xff"),
    "CSV, Windows-1252": ("d.csv", "prompt,completion\na,é\n".encode("cp1252"), "d.csv:2:completion", '"é" in Windows'),
    "CSV, Windows-1252 header": ("d.csv", "Straße,b\na,b\n".encode("cp1252"), "d.csv:1", '"ß" in Windows'),
    "CSV, a cell under no name": ("d.csv", b"prompt,\na,b\n", "d.csv:2:row", "under the name of a column"),
    "JSON object of an empty array": ("d.json", b'{\n"data": []\n}', "d.json", "must have rows"),
    "gzip, cut off": ("d.jsonl.gz", b"\x1f\x8b\x08\0\0\0\0\0\0\x03", "d.jsonl.gz", "ended before"),
    "Arrow, cut off": ("d.arrow", b"ARROW1\0\0", "d.arrow", "readable Arrow"),
    "column of a prompt": (
        "d.jsonl",
        b'{"prompt": "a", "completion": "b", "system": "c"}\n',
        "d.jsonl:1:system",
        "no other input columns",
    ),
    "function call that is no JSON": (
        "d.jsonl",
        sharegpt({"from": "human", "value": "a"}, {"from": "function_call", "value": "f(1)"}).encode(),
        "d.jsonl:1:conversations[1].value",
        "JSON of its name",
    ),
    "alpaca, input and context": (
        "d.jsonl",
        b'{"instruction": "a", "input": "b", "context": "c", "output": "d"}\n',
        "d.jsonl:1:context",
        "both",
    ),
    "a pointer of Git LFS": (
        "d.jsonl",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "d.jsonl",
        "git lfs pull",
    ),
    "a pointer of Git LFS instead of Parquet": (
        "d.parquet",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "d.parquet",
        "git lfs pull",
    ),
    "an array under the name .jsonl": ("d.jsonl", b'[\n  {"text": "a"}\n]\n', "d.jsonl", "rename the file to .json"),
    "a web page": ("d.csv", b"\n<!DOCTYPE html>\n<html></html>\n", "d.csv", "a web page"),
    "CSV, column twice": ("d.csv", b"text,text\na,b\n", "d.csv:1", '"text" twice'),
    "CSV, byte-order mark only": ("d.csv", b"\xef\xbb\xbf", "d.csv:1", "an empty line"),
    "CSV, empty completion": ("d.csv", b"prompt,completion\na,\n", "d.csv:2:completion", "empty"),
    "Parquet cut off": ("d.parquet", parquet_rows([{"text": "a"}])[:40], "d.parquet", "Parquet"),
    "Parquet, null": ("d.parquet", parquet_rows([{"text": "a"}, {"text": None}]), "d.parquet:2:text", "null"),
    "Parquet, column twice": ("d.parquet", parquet_twice(), "d.parquet", '"text" twice'),
    "blank text": ("d.jsonl", b'{"text": " \\n"}\n', "d.jsonl:1:text", "empty"),
    "control token in text": ("d.jsonl", b'{"text": "<|bos|>"}\n', "d.jsonl:1:text", "bos"),
    "empty completion": ("d.jsonl", b'{"prompt": "a", "completion": ""}\n', "d.jsonl:1:completion", "empty"),
    "prompt a list, completion not": (
        "d.jsonl",
        b'{"prompt": [], "completion": "a"}\n',
        "d.jsonl:1:prompt",
        "string",
    ),
    "completion without assistant": (
        "d.jsonl",
        json.dumps({"prompt": [ASKED, SAID], "completion": [ASKED]}).encode(),
        "d.jsonl:1:completion",
        "assistant",
    ),
    "alpaca, input a number": (
        "d.jsonl",
        b'{"instruction": "a", "input": 0, "output": "b"}\n',
        "d.jsonl:1:input",
        "int 0",
    ),
    "alpaca, control token": (
        "d.jsonl",
        b'{"instruction": "a", "output": "<|im_end|>"}\n',
        "d.jsonl:1:output",
        "im_end",
    ),
    "ShareGPT, unknown speaker": (
        "d.jsonl",
        sharegpt({"from": "alien", "value": "a"}).encode(),
        "d.jsonl:1:conversations[0].from",
        "alien",
    ),
    "ShareGPT, no value": (
        "d.jsonl",
        sharegpt({"from": "human", "value": "a"}, {"from": "gpt"}).encode(),
        "d.jsonl:1:conversations[1].value",
        "null",
    ),
    "ShareGPT, control token": (
        "d.jsonl",
        sharegpt({"from": "human", "value": "a"}, {"from": "gpt", "value": "<|bos|>"}).encode(),
        "d.jsonl:1:conversations[1].value",
        "bos",
    ),
}


LABELLED = {  # kind -> rows of --task classification, the place that is named, a word that is said
    "label, a fraction": ([{"text": "a", "label": 1.5}], ":1:label", "1.5"),
    "label, a fraction as text": ([{"text": "a", "label": "4.0"}], ":1:label", "4.0"),
    "label, NaN": ([{"text": "a", "label": "nan"}], ":1:label", "nan"),
    "label, a truth value": ([{"text": "a", "label": True}], ":1:label", "yes and no"),
    "label, null": ([{"text": "a", "label": None}], ":1:label", "null"),
    "label, empty": ([{"text": "a", "label": "x"}, {"text": "b", "label": " "}], ":2:label", "an empty text"),
    "labelled row without a text": ([{"text": "", "label": "x"}], ":1:text", "empty"),
    "labelled text with a system message": (
        [{"text": "a", "label": "x", "system": "b"}],
        ":1:system",
        "no other input",
    ),
    "rows without a label": ([{"text": "a", "stars": 3}], "", "--columns"),
}


def chat_file(folder: Path, line: str | bytes) -> Path:
    """A JSONL file with a bad second line between good ones."""
    path = folder / "data.jsonl"
    raw = line.encode() if isinstance(line, str) else line
    path.write_bytes(GOOD.encode() + b"\n" + raw + b"\n\n" + GOOD.encode() + b"\n")
    return path
