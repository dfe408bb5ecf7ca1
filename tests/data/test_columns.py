"""Exact: columns are mapped, common names are recognised, and other names are refused with the mapping to pass."""

import json

import pytest

from onecard.config import DataConfig, Source
from onecard.data.load import load_dataset
from onecard.data.records import read_records
from onecard.errors import UserError
from tests.conftest import make_tokenizer, write_rows

TOKENIZER = make_tokenizer()


def read(folder, rows, **settings):
    return read_records(Source(path=str(write_rows(folder / "d.jsonl", rows)), **settings))


def turns(record):
    return [(turn["role"], turn["content"]) for turn in record.messages]


ASKED = [("user", "how?"), ("assistant", "two")]


@pytest.mark.parametrize(
    "row, columns, mapping",
    [
        ({"question": "how?", "answer": "two"}, None, "prompt=question,completion=answer"),
        ({"query": "how?", "response": "two"}, None, "prompt=query,completion=response"),
        ({"input": "how?", "output": "two"}, None, "prompt=input,completion=output"),
        ({"instruction": "how?", "response": "two"}, None, "prompt=instruction,completion=response"),
        ({"problem": "how?", "solution": "two", "answer": "2"}, None, "prompt=problem,completion=solution"),
        ({"Question ": "how?", "ANSWER": "two"}, None, "prompt=Question ,completion=ANSWER"),
        (
            {"riddle": "how?", "joke": "two"},
            {"prompt": "riddle", "completion": "joke"},
            "prompt=riddle,completion=joke",
        ),
        ({"a, b": "how?", "c=d": "two"}, {"prompt": "a, b", "completion": "c=d"}, "prompt=a, b,completion=c=d"),
    ],
)
def test_a_question_and_its_answer_are_a_chat(row, columns, mapping, tmp_path):
    found = read(tmp_path, [row], columns=columns)
    assert turns(found.records[0]) == ASKED and found.layout.mapping == mapping
    named = [name for name in mapping.replace(",", "=").split("=")[1::2] if name in row]
    assert all(name in found.notices[0] for name in named)  # told on the screen


def test_the_mapping_and_what_is_recognised_are_the_same_tokens(tmp_path):
    path = write_rows(tmp_path / "d.jsonl", [{"question": "how?", "answer": "two"}])
    mapped = DataConfig(columns="prompt=question,completion=answer")
    assert load_dataset(str(path), TOKENIZER, mapped).fingerprint() == (
        load_dataset(str(path), TOKENIZER, DataConfig()).fingerprint()
    )


def test_the_format_of_a_mapping_may_be_plain_text(tmp_path):
    columns = {"prompt": "a", "completion": "b"}
    found = read(tmp_path, [{"a": "how?", "b": "two"}], columns=columns, format="prompt_completion")
    assert (found.records[0].prompt, found.records[0].completion) == ("how?", "two")
    rows = [{"prompt": "how?", "completion": "two"}]
    assert read(tmp_path, rows).records[0].kind == "completion"
    assert turns(read(tmp_path, rows, format="alpaca").records[0]) == ASKED


def test_other_names_are_mapped(tmp_path):
    messages = [{"role": role, "content": content} for role, content in ASKED]
    found = read(
        tmp_path, [{"dialog": messages, "persona": "Be brief."}], columns={"messages": "dialog", "system": "persona"}
    )
    assert turns(found.records[0]) == [("system", "Be brief."), *ASKED]
    assert read(tmp_path, [{"body": "two mugs"}], columns={"text": "body"}).records[0].text == "two mugs"
    lists = {"a": messages[:1], "b": messages[1:]}
    found = read(tmp_path, [lists], columns={"prompt": "a", "completion": "b"})
    assert turns(found.records[0]) == ASKED and found.format == "prompt_completion"
    found = read(
        tmp_path, [{"completion": "how?", "prompt": "two"}], columns={"prompt": "completion", "completion": "prompt"}
    )
    assert turns(found.records[0]) == ASKED


@pytest.mark.parametrize(
    "row, do",
    [
        ({"riddle": "a", "id": 7}, "--columns text=riddle"),
        ({"user_question": "a", "final_answer": "b", "source": "c"}, "prompt=user_question,completion=final_answer"),
        ({"source": "c", "modelAnswer": "b", "studentQuestion": "a"}, "prompt=studentQuestion,completion=modelAnswer"),
        ({"quetsion": "a", "anwser": "b"}, "prompt=quetsion,completion=anwser"),
        ({"my question": "a", "my answer": "b"}, "--columns 'prompt=my question,completion=my answer'"),
        ({"first": "a", "second": "b"}, "prompt=first,completion=second"),
        ({"dialog": [{"role": "user", "content": "a"}], "text_id": "b"}, "--columns messages=dialog"),
        ({"main_body": "a", "url": "b", "title": "c"}, "--columns text=main_body"),
        ({"x": 1, "y": 2}, "prompt=COLUMN,completion=COLUMN"),
    ],
)
def test_unknown_names_are_refused_with_the_mapping_to_pass(row, do, tmp_path):
    with pytest.raises(UserError) as error:
        read(tmp_path, [row, row])
    assert do in error.value.do and next(iter(row)) in error.value.found


def test_a_suggested_mapping_is_taken(tmp_path):
    row = {"user_question": "how?", "final_answer": "two"}
    with pytest.raises(UserError) as error:
        read(tmp_path, [row])
    words = error.value.do.split("--columns ")[1]
    assert turns(read(tmp_path, [row], columns=words).records[0]) == ASKED


@pytest.mark.parametrize(
    "row, columns, said",
    [
        ({"question": "a", "answer": "b"}, "prompt=questoin,completion=answer", '"questoin".*did you mean "question"'),
        ({"question": "a", "answer": "b", "prompt": "c"}, "prompt=question,completion=answer", "system=prompt"),
        ({"question": "a", "solution": "b"}, "completion=solution", "prompt=question"),
    ],
)
def test_a_mapping_that_cannot_be_is_refused(row, columns, said, tmp_path):
    with pytest.raises(UserError, match=f"(?s){said}"):
        read(tmp_path, [row], columns=columns)


def test_a_column_with_the_same_values_may_be_mapped_onto_it(tmp_path):
    row = {"question": "how?", "prompt": "how?", "answer": "two"}
    assert turns(read(tmp_path, [row], columns="prompt=question,completion=answer").records[0]) == ASKED


def test_a_bad_row_is_named_by_the_column_of_the_file(tmp_path):
    rows = [
        {"riddle": "a", "joke": "b"},
        {"riddle": "a", "joke": 7},
        {"riddle": "a"},
        {"riddle": "a", "joke": "<|im_end|>"},
    ]
    path = write_rows(tmp_path / "d.jsonl", rows)
    config = DataConfig(columns="prompt=riddle,completion=joke", on_bad_rows="skip")
    found = load_dataset(str(path), TOKENIZER, config)
    assert [error.where for error in found.bad] == [f"{path}:{line}:joke" for line in (2, 3, 4)]
    assert "joke must be a string" in str(found.bad[0])


def test_the_command_line_takes_a_mapping():
    from onecard.cli.app import TrainFields
    from onecard.terminal import given

    kind = TrainFields.__origin__.__args__[0]
    words = given(kind(columns=["prompt=a b", "completion=c"], data=["x:0.5", "y:0.5"]))
    assert DataConfig(columns=words["columns"]).columns == {"prompt": "a b", "completion": "c"}
    assert words["data"] == ["x:0.5", "y:0.5"]


def test_a_mapping_is_plain_json():
    config = DataConfig(columns={"prompt": "a"})
    assert json.loads(config.model_dump_json())["columns"] == {"prompt": "a"}


def test_a_mapped_column_may_come_late_and_is_looked_for_in_all_rows(tmp_path):
    rows = [{"q": "how?", "a": "two"}] * 1200
    columns = {"prompt": "q", "completion": "a", "system": "rules"}
    found = read(tmp_path, [*rows, {"q": "how?", "a": "two", "rules": "be brief"}], columns=columns)
    assert len(found.records) == 1201 and turns(found.records[-2]) == ASKED
    assert turns(found.records[-1]) == [("system", "be brief"), *ASKED]
    with pytest.raises(UserError, match='must have the column "rules"'):
        read(tmp_path, rows, columns=columns)
    late = [{"question": "how?", "answer": "two"}] * 1200 + [{"q": "how?", "a": "two"}]
    with pytest.raises(UserError, match=r"d\.jsonl:1201:question"):  # no format of the first rows has the mapped pair
        read(tmp_path, late, columns={"prompt": "q", "completion": "a"})
    with pytest.raises(UserError, match=r"d\.jsonl:1201:a\b"):
        read(tmp_path, [*rows, {"q": "how?"}], columns={"prompt": "q", "completion": "a"})
