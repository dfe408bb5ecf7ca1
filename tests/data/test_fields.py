"""Exact: every column and key that public data sets write is read as meant, or named."""

import bz2
import gzip
import json
import lzma

import pyarrow
import pyarrow.parquet
import pytest

from onecard.config import DataConfig
from onecard.data.load import load_dataset
from onecard.data.records import read_records
from onecard.errors import UserError
from tests.conftest import make_tokenizer, write_rows

USER, ANSWER = {"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "Five."}
ASKED, SAID = {"from": "human", "value": "2+3?"}, {"from": "gpt", "value": "Five."}
SYSTEM = {"role": "system", "content": "Be brief."}
FUNCTION = {"name": "f", "arguments": {"a": None}}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": FUNCTION}]}
RETURNED = {"role": "function", "name": "f", "content": "7"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
EMPTY = {"tool_calls": [], "reasoning_content": "", "name": "", "tool_call_id": "", "function_call": None}

ROWS = {
    "ShareGPT's system column": ({"system": "Be brief.", "conversations": [ASKED, SAID]}, [SYSTEM, USER, ANSWER]),
    "alpaca's system and history": (
        {"instruction": "x", "output": "y", "system": "Be brief.", "history": [["2+3?", "Five."]]},
        [SYSTEM, USER, ANSWER, {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
    ),
    "OpenAI's function_call": (
        {
            "messages": [
                USER,
                {"role": "assistant", "content": None, "function_call": FUNCTION},
                {**USER, "role": "function"},
            ]
        },
        [USER, CALL, {**USER, "role": "tool"}],
    ),
    "function_call as JSON text": (
        {"messages": [USER, {**ANSWER, "function_call": {"name": "f", "arguments": '{"a": null}'}}]},
        [USER, {**CALL, "content": "Five."}],
    ),
    "ShareGPT's function_call": (
        {"conversations": [ASKED, {"from": "function_call", "value": json.dumps(FUNCTION)}]},
        [USER, CALL],
    ),
    "empty fields": ({"messages": [{**USER, **EMPTY}, {**ANSWER, **EMPTY}], "tools": "", "images": []}, [USER, ANSWER]),
    "roles under conversations": ({"conversations": [USER, ANSWER]}, [USER, ANSWER]),
    "from under messages": ({"messages": [ASKED, SAID]}, [USER, ANSWER]),
    "conversation": ({"conversation": [ASKED, SAID]}, [USER, ANSWER]),
    "JSON text": ({"messages": json.dumps([USER, ANSWER])}, [USER, ANSWER]),
    "thinking": ({"messages": [USER, {**ANSWER, "thinking": "t"}]}, [USER, {**ANSWER, "reasoning_content": "t"}]),
    "question and answer": ({"question": "2+3?", "answer": "Five."}, [USER, ANSWER]),
    "context": (
        {"instruction": "Who?", "context": "Bo.", "response": "Five."},
        [{"role": "user", "content": "Who?\n\nBo."}, ANSWER],
    ),
    "system_prompt of a question": (
        {"question": "2+3?", "response": "Five.", "system_prompt": "Be brief."},
        [SYSTEM, USER, ANSWER],
    ),
    "system beside messages": ({"messages": [USER, ANSWER], "system": "Be brief."}, [SYSTEM, USER, ANSWER]),
    "system beside the same": ({"messages": [SYSTEM, USER, ANSWER], "system": "Be brief."}, [SYSTEM, USER, ANSWER]),
    "a call without function": (
        {"messages": [USER, {**CALL, "tool_calls": [{"id": "c1", **FUNCTION}]}]},
        [USER, {**CALL, "tool_calls": [{"type": "function", "id": "c1", "function": FUNCTION}]}],
    ),
    "a call without arguments": (
        {"messages": [USER, {**CALL, "tool_calls": [{"function": {"name": "f", "arguments": ""}}]}]},
        [USER, {**CALL, "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}],
    ),
    "no calls as text": ({"messages": [{**USER, "tool_calls": "[]"}, {**ANSWER, "tool_calls": "[]"}]}, [USER, ANSWER]),
    "the question as input": ({"instruction": "", "input": "2+3?", "output": "Five."}, [USER, ANSWER]),
    "good answer of KTO": ({"messages": [USER, ANSWER], "label": True}, [USER, ANSWER]),
}


@pytest.mark.parametrize("name", list(ROWS))
def test_a_row_is_read_as_meant(name, tmp_path):
    row, messages = ROWS[name]
    record = read_records(write_rows(tmp_path / "d.jsonl", [row])).records[0]
    assert list(record.messages) == messages


@pytest.mark.parametrize("key", ["weight", "loss_weight", "train", "loss"])
@pytest.mark.parametrize("turns", [[USER, ANSWER], [ASKED, SAID]])
def test_a_turn_that_must_not_be_learned(key, turns, tmp_path):
    row = {"messages": [turns[0], {**turns[1], key: 0}, turns[0], {**turns[1], key: True}]}
    assert read_records(write_rows(tmp_path / "d.jsonl", [row])).records[0].unlearned == (1,)


@pytest.mark.parametrize("tools", [[TOOL], [TOOL["function"]], json.dumps([TOOL["function"]])])
@pytest.mark.parametrize("key", ["tools", "functions"])
@pytest.mark.parametrize("row", [{"conversations": [ASKED, SAID]}, {"prompt": [USER], "completion": [ANSWER]}])
def test_tools_of_every_format_are_openais(tools, key, row, tmp_path):
    assert read_records(write_rows(tmp_path / "d.jsonl", [{**row, key: tools}])).records[0].tools == [TOOL]


def test_what_is_not_used_is_named_once(tmp_path):
    rows = [{"messages": [{**USER, "date": 1}, {**ANSWER, "date": 2}], "source": "web\x1b[2J"}] * 3
    rows.append({"messages": [USER, ANSWER], "source": None})
    assert read_records(write_rows(tmp_path / "d.jsonl", rows)).notices == [
        '"messages[].date" is not used: 3 rows',
        '"source" is not used: 3 rows',
    ]
    rows = [{"question": "a", "answer": "b"}]
    notices = read_records(write_rows(tmp_path / "d.jsonl", rows)).notices
    assert notices == ["read question as prompt, answer as completion"]
    path = write_rows(tmp_path / "d.jsonl", [{"prompt": "a", "answer": "b"}])
    assert read_records(path).notices == ["read answer as completion"]


def test_two_system_messages_are_refused(tmp_path):
    path = write_rows(tmp_path / "d.jsonl", [{"messages": [SYSTEM, USER, ANSWER], "system_prompt": "Be long."}])
    with pytest.raises(UserError, match=r"d\.jsonl:1:system_prompt: a row must have one system message"):
        read_records(path)


def test_names_that_the_template_leaves_out_are_told(tmp_path):
    path = write_rows(tmp_path / "d.jsonl", [{"messages": [{**USER, "name": "Bo"}, ANSWER]}])
    assert "names of those who speak: 1 row" in load_dataset(str(path), make_tokenizer(), DataConfig()).notices[0]


def parquet(path, **arguments):
    """Two calls of tools of different arguments, whose fields Parquet unites."""
    rows = []
    for name, own in arguments.items():
        call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": name, "arguments": own}}]}
        parameters = {"required": sorted(own), "properties": {key: {"type": "integer"} for key in own}}
        tool = {"type": "function", "function": {"name": name, "parameters": parameters}}
        rows.append({"messages": [{**USER, "tool_calls": None}, call], "tools": [tool]})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    read = read_records(path)
    return [record.messages[1]["tool_calls"][0]["function"]["arguments"] for record in read.records], read


def test_parquet_adds_no_arguments_and_takes_no_required_null(tmp_path):
    arguments, read = parquet(tmp_path / "d.parquet", move={"x": 0, "y": None}, turn={"theta": 90})
    assert arguments == [{"x": 0, "y": None}, {"theta": 90}]
    properties = [set(record.tools[0]["function"]["parameters"]["properties"]) for record in read.records]
    assert properties == [{"x", "y"}, {"theta"}] and "null arguments" in read.notices[0]


def test_nulls_in_text_stay(tmp_path):
    arguments, read = parquet(tmp_path / "d.parquet", move='{"x": null}', turn='{"theta": 90}')
    assert arguments == [{"x": None}, {"theta": 90}] and not read.notices


@pytest.mark.parametrize("suffix, pack", [(".gz", gzip.compress), (".xz", lzma.compress), (".bz2", bz2.compress)])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_compressed_files(suffix, pack, kind, tmp_path):
    text = {".jsonl": '{"text": "é"}\n', ".json": '[{"text": "é"}]', ".csv": "text\né\n"}[kind]
    path = tmp_path / f"d{kind}{suffix}"
    path.write_bytes(pack(text.encode()))
    assert [record.text for record in read_records(path).records] == ["é"]


def test_zstandard(tmp_path):
    path = tmp_path / "d.jsonl.zst"
    with pyarrow.output_stream(str(path), compression="zstd") as file:
        file.write(b'{"text": "a"}\n{"text": "b"}\n')
    assert [record.text for record in read_records(path).records] == ["a", "b"]


def test_a_folder_of_save_to_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}]).save_to_disk(tmp_path / "one", num_shards=2)
    assert [record.text for record in read_records(tmp_path / "one").records] == ["a", "b"]
    datasets.DatasetDict({"train": datasets.Dataset.from_list([{"text": "a"}])}).save_to_disk(tmp_path / "splits")
    with pytest.raises(UserError, match="splits train"):
        read_records(tmp_path / "splits")
    with pytest.raises(UserError, match="a folder"):
        read_records(tmp_path)


@pytest.mark.parametrize("how", ["cut", "drop", "error"])
def test_long_rows(how, tmp_path):
    rows = [{"prompt": "two", "completion": "the fox " * 30}, {"prompt": "two", "completion": "mugs"}]
    path = write_rows(tmp_path / "d.jsonl", rows)
    config = DataConfig(max_seq_length=16, on_long_rows=how)
    if how == "error":
        with pytest.raises(UserError, match=r"d\.jsonl:1:row: a row must have at most 16 tokens"):
            load_dataset(str(path), make_tokenizer(), config)
        return
    dataset = load_dataset(str(path), make_tokenizer(), config)
    assert dataset.num_records == 2 and len(dataset.examples) == (2 if how == "cut" else 1)
    told = {
        "cut": "answers are cut at 16 tokens or lost behind them: 1 row, 50.0%",
        "drop": "dropped as longer than 16",
    }
    assert told[how] in dataset.notices[0]


def test_a_prompt_cut_off_an_unlearned_tail_is_no_cut_answer(tmp_path):
    row = {"messages": [USER, ANSWER, {"role": "user", "content": "the fox " * 60}]}
    dataset = load_dataset(
        str(write_rows(tmp_path / "d.jsonl", [row])), make_tokenizer(), DataConfig(max_seq_length=64)
    )
    assert dataset.num_truncated == 1 and not dataset.notices
