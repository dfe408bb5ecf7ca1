"""Exact: each kind of bad data is refused by file, line and field, and can be skipped; nothing else is raised."""

import json

import pytest

from onecard.config import DataConfig
from onecard.data.chat import mask
from onecard.data.chat.mask import encode
from onecard.data.load import load_dataset
from onecard.data.records import read_records
from onecard.data.tokens import prepare
from onecard.errors import UserError
from tests.conftest import make_tokenizer, write_rows
from tests.data.bad_data import ASKED, CHAT_LINES, FILES, GOOD, LABELLED, SAID, chat_file

TOKENIZER = make_tokenizer()


@pytest.mark.parametrize("kind", list(CHAT_LINES))
def test_a_bad_line_is_named_and_can_be_skipped(kind, tmp_path):
    line, field, said = CHAT_LINES[kind]
    path = chat_file(tmp_path, line)
    with pytest.raises(UserError) as error:
        load_dataset(str(path), TOKENIZER, DataConfig())
    assert error.value.where == f"{path}:2:{field}" and said in str(error.value)
    str(error.value).encode()  # a message with half a surrogate pair could not be printed
    skipped = load_dataset(str(path), TOKENIZER, DataConfig(on_bad_rows="skip"))
    assert (len(skipped.examples), skipped.num_skipped, skipped.num_records) == (2, 1, 3)


@pytest.mark.parametrize("kind", list(FILES))
def test_a_bad_file_is_named(kind, tmp_path):
    name, raw, where, said = FILES[kind]
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(UserError) as error:
        load_dataset(str(tmp_path / name), TOKENIZER, DataConfig())
    assert error.value.where == str(tmp_path / where) and said in str(error.value)


@pytest.mark.parametrize("kind", list(LABELLED))
def test_a_bad_label_is_named(kind, tmp_path):
    rows, where, said = LABELLED[kind]
    path = write_rows(tmp_path / "d.jsonl", rows)
    with pytest.raises(UserError) as error:
        load_dataset(str(path), TOKENIZER, DataConfig(), "classification")
    assert error.value.where == f"{path}{where}" and said in str(error.value)


def test_bad_rows_of_reading_and_of_tokenizing_come_in_one_list(tmp_path):
    control = GOOD.replace("two", "<|im_end|>")
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join([control, "{", GOOD, control]))
    with pytest.raises(UserError) as error:
        load_dataset(str(path), TOKENIZER, DataConfig())
    lines = str(error.value).splitlines()
    assert "3 bad rows" in str(error.value)
    told = [line.split("d.jsonl:")[1].split(":")[0] for line in lines if "d.jsonl:" in line]
    assert told == ["1", "2", "4"]


@pytest.mark.parametrize("name, line", [("d.jsonl", 2), ("d.csv", 3), ("d.parquet", 2)])
def test_a_bad_row_hides_none_after_it(name, line, tmp_path):
    if name == "d.jsonl":
        (tmp_path / name).write_text('{"text": "a"}\n{"text": 7}\n{"text": "b"}\n')
    elif name == "d.csv":
        (tmp_path / name).write_bytes(b"text\na\n\xff\nb\n")
    else:
        import pyarrow
        import pyarrow.parquet

        rows = pyarrow.Table.from_pylist([{"text": "a"}, {"text": None}, {"text": "b"}])
        pyarrow.parquet.write_table(rows, tmp_path / name)
    read = read_records(tmp_path / name, on_bad_rows="skip")
    assert [record.text for record in read.records] == ["a", "b"] and read.num_skipped == 1
    assert read.bad[0].where.startswith(f"{tmp_path / name}:{line}:")


def test_two_users_in_a_row_and_parts_of_text_are_good(tmp_path):
    parts = {"role": "user", "content": [{"type": "text", "text": "two "}, {"type": "text", "text": "mugs"}]}
    path = write_rows(tmp_path / "d.jsonl", [{"messages": [ASKED, parts, SAID]}])
    record = read_records(path).records[0]
    assert record.kind == "chat" and record.messages[1]["content"] == "two mugs"


def test_what_openai_and_sharegpt_write_is_read(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]}
    path = write_rows(tmp_path / "d.jsonl", [{"messages": [ASKED, call, {"role": "tool", "content": "7"}, SAID]}])
    function = read_records(path).records[0].messages[1]["tool_calls"][0]["function"]
    assert function["arguments"] == {"a": 1}  # a template would write the string as a quoted string
    turns = [
        ("human", "a"),
        ("function_call", '{"name": "f", "arguments": {"a": 1}}'),
        ("observation", "7"),
        ("gpt", "b"),
    ]
    write_rows(path, [{"conversations": [{"from": name, "value": text} for name, text in turns]}])
    record = read_records(path).records[0]
    assert [turn["role"] for turn in record.messages] == ["user", "assistant", "tool", "assistant"]


def test_kinds_and_counts(tmp_path):
    path = write_rows(tmp_path / "d.jsonl", [{"prompt": "a", "completion": "b"}])
    read = read_records(path)
    assert read.records[0].kind == "completion" and read.num_skipped == 0
    dataset = prepare(read, TOKENIZER, DataConfig())
    assert dataset.num_records == 1 and dataset.summary()["format"] == "prompt_completion"
    write_rows(path, [{"text": "a"}])
    assert read_records(path).records[0].kind == "text"


def test_a_json_array_of_lines_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "d.json"
    path.write_bytes(b"\xef\xbb\xbf \n[ " + json.dumps({"text": "a"}).encode() + b" ,\n\t{}]\n")
    read = read_records(path, on_bad_rows="skip")
    assert [record.text for record in read.records] == ["a"] and read.bad[0].where == f"{path}:2:text"
    path.write_bytes(b'[{"text": "a", "text": "b"}, {"text": "c"}]')
    read = read_records(path, on_bad_rows="skip")
    assert [record.text for record in read.records] == ["c"] and read.num_skipped == 1
    path.write_bytes(b"[ ]")
    with pytest.raises(UserError, match="must have rows"):
        read_records(path)


@pytest.mark.parametrize("long", ["prompt", "completion", "text", "user", "assistant"])
def test_a_huge_row_is_cut_to_the_tokens_of_the_whole(long, tmp_path):
    words = "".join(f"the lazy dog {i} " for i in range(60_000))  # about a megabyte
    row = {"prompt": "how?", "completion": "two"} | ({long: words} if long in ("prompt", "completion") else {})
    if long == "text":
        row = {"text": words}
    if long in ("user", "assistant"):
        turns = {"user": "how?", "assistant": "two"} | {long: words}
        row = {"messages": [{"role": role, "content": text} for role, text in turns.items()]}
    record = read_records(write_rows(tmp_path / "d.jsonl", [row])).records[0]
    whole, cut = (encode(record, TOKENIZER, most) for most in (10**6, 100))
    assert cut.truncated and not whole.truncated
    assert cut.input_ids == whole.input_ids[:100] and cut.labels == whole.labels[:100]


def test_a_huge_row_is_not_tokenized_whole(tmp_path, monkeypatch):
    record = read_records(write_rows(tmp_path / "d.jsonl", [{"text": "a b " * 10**6}])).records[0]
    longest = 0
    whole = mask.encode_ids

    def measured(text, *args):
        nonlocal longest
        longest = max(longest, len(text))
        return whole(text, *args)

    monkeypatch.setattr(mask, "encode_ids", measured)
    encode(record, TOKENIZER, 64)
    assert longest <= 65 * mask.LONGEST_TOKEN
