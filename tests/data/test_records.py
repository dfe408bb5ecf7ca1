"""Exact: formats are recognised; each kind of bad row is named by file, line and field."""

import json

import pytest

from onecard.config import DataConfig
from onecard.data.load import load_dataset
from onecard.data.records import read_records
from onecard.errors import UserError
from tests.conftest import chat_rows, make_tokenizer, write_rows

GOOD = {"messages": [{"role": "user", "content": "how many?"}, {"role": "assistant", "content": "two"}]}


def chat(*turns):
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]})


ASKED = ("user", "how many?")
BAD_LINES = {
    "not JSON": (b'{"messages": [', "data.jsonl:2:row", "JSON"),
    "not an object": (b"[1, 2]", "data.jsonl:2:row", "object"),
    "not UTF-8": (b'{"messages": "\xff"}', "data.jsonl:2:row", "UTF-8"),
    "nested too deep": (b"[" * 100_000 + b"]" * 100_000, "data.jsonl:2:row", "deep"),
    "key twice": (b'{"messages": [], "messages": []}', "data.jsonl:2:messages", "once"),
    "missing field": (b'{"text": "a"}', "data.jsonl:2:messages", "must have"),
    "wrong type": (b'{"messages": "hello"}', "data.jsonl:2:messages", "list"),
    "no messages": (b'{"messages": []}', "data.jsonl:2:messages", "list"),
    "message not an object": (b'{"messages": ["hi"]}', "data.jsonl:2:messages[0]", "object"),
    "unknown role": (chat(ASKED, ("robot", "x")), "data.jsonl:2:messages[1].role", "robot"),
    "null content": (chat(ASKED, ("assistant", None)), "data.jsonl:2:messages[1].content", "null"),
    "empty completion": (chat(ASKED, ("assistant", "  ")), "data.jsonl:2:messages[1].content", "empty"),
    "number as content": (chat(ASKED, ("assistant", 7)), "data.jsonl:2:messages[1].content", "int 7"),
    "no assistant": (chat(ASKED), "data.jsonl:2:messages", "assistant"),
    "image part": (
        json.dumps({"messages": [{"role": "user", "content": [{"type": "image"}]}]}),
        "data.jsonl:2:messages[0].content[0]",
        "text",
    ),
    "NUL": (chat(ASKED, ("assistant", "a\x00")), "data.jsonl:2:messages[1].content", "NUL"),
    "half a surrogate": (
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        "data.jsonl:2:messages[0].content",
        "surrogate",
    ),
    "control token": (chat(("user", "a"), ("assistant", "<|im_end|>")), "data.jsonl:2:messages[1].content", "im_end"),
    "file cut off": (b'{"messages": [{"role": "us', "data.jsonl:2:row", "JSON"),
}


@pytest.mark.parametrize("kind", list(BAD_LINES))
def test_a_bad_row_is_named(kind, tmp_path):
    line, where, said = BAD_LINES[kind]
    raw = line.encode() if isinstance(line, str) else line
    path = tmp_path / "data.jsonl"
    good = json.dumps(GOOD).encode()
    path.write_bytes(good + b"\n" + raw + b"\n\n" + good + b"\n")
    with pytest.raises(UserError) as error:
        load_dataset(str(path), make_tokenizer(), DataConfig())
    assert where in str(error.value) and said in str(error.value)
    skipped = load_dataset(str(path), make_tokenizer(), DataConfig(on_bad_rows="skip"))
    assert len(skipped.examples) == 2 and len(skipped.bad) == 1 and skipped.summary()["bad rows skipped"] == 1


def test_all_bad_rows_are_listed(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(["{"] * 30 + [json.dumps(GOOD)]))
    with pytest.raises(UserError) as error:
        read_records(path)
    assert "30 bad rows" in str(error.value) and "d.jsonl:20:row" in str(error.value) and "10 more" in str(error.value)


FORMATS = {
    "messages": chat_rows(2)[1],
    "prompt_completion": {"prompt": "two blue", "completion": " mugs"},
    "alpaca": {"instruction": "how many mugs?", "input": "blue", "output": "two"},
    "sharegpt": {"conversations": [{"from": "human", "value": "how many?"}, {"from": "gpt", "value": "two"}]},
    "text": {"text": "the quick brown fox"},
}


@pytest.mark.parametrize("name", list(FORMATS))
def test_formats_are_recognised(name, tmp_path):
    path = write_rows(tmp_path / "d.jsonl", [FORMATS[name]] * 3)
    dataset = load_dataset(str(path), make_tokenizer(), DataConfig())
    assert dataset.format == name and len(dataset.examples) == 3
    assert all(example.num_supervised > 0 for example in dataset.examples)


def test_every_kind_of_file_reads_the_same(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": f"two, {i}\nlines", "completion": " mugs"} for i in range(3)]
    write_rows(tmp_path / "d.jsonl", rows)
    (tmp_path / "d.json").write_text(json.dumps(rows))
    lines = ["prompt,completion"] + [f'"two, {i}\nlines", mugs' for i in range(3)]
    (tmp_path / "d.csv").write_text("\n".join(lines))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    found = {}
    for kind in ("jsonl", "json", "csv", "parquet"):
        read = read_records(tmp_path / f"d.{kind}")
        found[kind] = [(record.prompt, record.completion) for record in read.records]
    assert all(pairs == found["jsonl"] for pairs in found.values()) and len(found["csv"]) == 3
    assert [record.line for record in read_records(tmp_path / "d.csv").records] == [2, 4, 6]


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("d.md", b"x", "must end in"),
        ("d.jsonl", b"", "empty file"),
        ("d.jsonl", b"\n\n", "none"),
        ("d.jsonl", b'{"a": 1}\n', "known format"),
        ("d.json", b'[{"text": 1}', "array"),
        ("d.parquet", b"PAR1", "Parquet"),
        ("d.csv", b"prompt,completion\na\n", "d.csv:2:row"),
        ("d.csv", b"prompt,completion\n\xff,b\n", "UTF-8"),
    ],
)
def test_a_bad_file_is_named(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read_records(tmp_path / name)
    assert said in str(error.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_records(tmp_path / "absent.jsonl")
