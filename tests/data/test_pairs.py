"""Exact: what becomes of rows of preferences, and which are refused, by file, line and field."""

import io

import pytest

from onecard.config import DataConfig
from onecard.data.chat.mask import IGNORE
from onecard.data.load import load_dataset
from onecard.data.loader import Loader
from onecard.data.packing import split
from onecard.data.preview import render_preview
from onecard.errors import UserError
from tests.conftest import make_tokenizer, write_rows

USER = {"role": "user", "content": "how many mugs?"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("two blue mugs", "the lazy dog"))
MORE = [USER, BAD, {"role": "user", "content": "really?"}]


def load(tmp_path, rows, loss="dpo", tokenizer=None, **fields):
    path = write_rows(tmp_path / "d.jsonl", rows)
    return load_dataset(str(path), tokenizer or make_tokenizer(), DataConfig(**fields), loss)


def documents(example, tokenizer):
    """The text of each document, and its answer's."""
    second = example.second or None
    for ids, labels in (
        (example.input_ids[:second], example.labels[:second]),
        (example.input_ids[second or len(example.input_ids) :], example.labels[second or len(example.labels) :]),
    ):
        yield tokenizer.decode(ids), tokenizer.decode([label for label in labels if label != IGNORE])


SAME = [
    {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"prompt": "how many mugs?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"prompt": "how many mugs?", "chosen": [GOOD], "rejected": [BAD]},
    {"prompt": [USER], "chosen": GOOD["content"], "rejected": BAD["content"]},
    {"prompt": [USER], "chosen": GOOD, "rejected": BAD},
]


@pytest.mark.parametrize("row", SAME, ids=range(len(SAME)))
def test_a_pair_in_each_form_is_the_same_two_documents(row, tmp_path):
    tokenizer = make_tokenizer()
    (example,) = load(tmp_path, [row]).examples
    head = "<|bos|><|im_start|>user\nhow many mugs?<|im_end|>\n<|im_start|>assistant\n"
    assert list(documents(example, tokenizer)) == [
        (f"{head}two blue mugs<|im_end|>\n", "two blue mugs<|im_end|>"),
        (f"{head}the lazy dog<|im_end|>\n", "the lazy dog<|im_end|>"),
    ]


def test_only_the_answer_after_the_shared_messages_is_scored(tmp_path):
    (example,) = load(tmp_path, [{"chosen": [*MORE, GOOD], "rejected": [*MORE, BAD]}]).examples
    assert [answer for _, answer in documents(example, make_tokenizer())] == [
        "two blue mugs<|im_end|>",
        "the lazy dog<|im_end|>",
    ]


@pytest.mark.parametrize(
    "chosen, rejected, prompt",
    [
        ("Q: how many? A: two blue mugs", "Q: how many? A: the lazy dog", "Q: how many? A:"),
        ("Q: how many?\nA: 12 mugs", "Q: how many?\nA: 13 mugs", "Q: how many?\nA:"),
        ("Q: how many?\n\ntwo", "Q: how many?\n\nfox", "Q: how many?\n\n"),
    ],
)
def test_texts_share_whole_words(chosen, rejected, prompt, tmp_path):
    (record,) = load(tmp_path, [{"chosen": chosen, "rejected": rejected}]).records
    assert record.prompt == prompt and record.rejected.prompt == prompt
    assert record.prompt + record.completion == chosen
    assert record.rejected.prompt + record.rejected.completion == rejected


WRONG = [
    ({"prompt": "p", "chosen": "a", "rejected": "a"}, "rejected", "must differ"),
    ({"prompt": "p", "chosen": " ", "rejected": "a"}, "chosen", "empty"),
    ({"prompt": "p", "chosen": "a", "rejected": None}, "rejected", "string"),
    ({"prompt": "p", "chosen": "a", "rejected": [BAD]}, "rejected", "one kind"),
    ({"chosen": [{"role": "user", "content": "one"}, GOOD], "rejected": [USER, BAD]}, "rejected", "same prompt"),
    ({"chosen": "one mug", "rejected": "two mugs"}, "rejected", "same prompt"),
    ({"chosen": [USER, GOOD], "rejected": [USER]}, "rejected", "each have an answer"),
    ({"prompt": "another?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "prompt", "begin with the row's prompt"),
    ({"prompt": [USER], "chosen": [USER], "rejected": [BAD]}, "chosen", "assistant message"),
    ({"prompt": [USER], "chosen": [{**GOOD, "content": 3}], "rejected": [BAD]}, "chosen[0].content", "string"),
    ({"chosen": [{"role": "king", "content": "x"}, GOOD], "rejected": [{"role": "king", "content": "x"}, BAD]},
     "chosen[0].role", "role"),
]  # fmt: skip


@pytest.mark.parametrize("row, field, words", WRONG, ids=[f"{i}-{field}" for i, (_, field, _) in enumerate(WRONG)])
def test_a_bad_pair_is_refused_by_its_field(row, field, words, tmp_path):
    with pytest.raises(UserError, match=words) as error:
        load(tmp_path, [SAME[0], row])
    assert error.value.where == f"{tmp_path / 'd.jsonl'}:2:{field}"
    assert len(load(tmp_path, [SAME[0], row], on_bad_rows="skip").examples) == 1


def test_judged_answers_and_pairs_are_the_same_for_kto(tmp_path):
    rows = [{"prompt": f"how many? {i}", "chosen": f" {i} mugs", "rejected": " the dog"} for i in range(3)]
    paired = load(tmp_path, rows, "kto")
    judged = [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in rows]
    judged += [{"prompt": row["prompt"], "completion": row["rejected"], "kto_tag": 0} for row in rows]
    for row in judged[3:]:
        row["label"] = row.pop("kto_tag")
    single = load(tmp_path, judged, "kto")
    for one, other in zip(paired.examples, single.examples, strict=True):
        assert (one.input_ids, one.labels, one.label) == (other.input_ids, other.labels, other.label)
    assert [example.label for example in single.examples] == [True] * 3 + [False] * 3
    assert single.summary()["desirable"] == single.summary()["undesirable"] == 3
    assert paired.fingerprint() == single.fingerprint()
    flipped = load(tmp_path, [*judged[:5], {**judged[5], "label": "true"}], "kto")
    assert flipped.fingerprint() != single.fingerprint()
    with pytest.raises(UserError, match="desirable"):
        load(tmp_path, [*judged, {**judged[0], "label": "maybe"}], "kto")


def test_a_pair_is_cut_or_dropped_as_a_pair(tmp_path):
    tokenizer = make_tokenizer(None)
    long = {"prompt": "fox " * 4, "chosen": "dog " * 20, "rejected": "mugs " * 6}
    same = {"prompt": "fox " * 4, "chosen": "dog " * 20 + "one", "rejected": "dog " * 20 + "two"}
    lost = {"prompt": "fox " * 40, "chosen": "dog", "rejected": "mugs"}
    cut = load(tmp_path, [long, same, lost, SAME_TEXT], tokenizer=tokenizer, max_seq_length=24)
    assert [example.where[-2:] for example in cut.examples] == [":1", ":4"]
    assert cut.examples[0].lengths[0] == 24 and cut.examples[0].truncated and cut.examples[0].answer_cut
    assert (cut.num_truncated, cut.num_unsupervised) == (3, 2)  # nothing differs in one, an answer is lost in the other
    assert any("answers are cut" in notice for notice in cut.notices)
    dropped = load(tmp_path, [long, same, lost, SAME_TEXT], tokenizer=tokenizer, max_seq_length=24, on_long_rows="drop")
    assert len(dropped.examples) == 1 and dropped.num_dropped == 3


SAME_TEXT = {"prompt": "fox", "chosen": " dog", "rejected": " mugs"}


def test_both_documents_of_a_pair_stay_together(tmp_path):
    rows = [{"prompt": f"fox {'dog ' * (i % 4)}", "chosen": f" {i} mugs", "rejected": " the dog" * (i % 3 + 1)}
            for i in range(17)]  # fmt: skip
    dataset = load(tmp_path, rows, tokenizer=make_tokenizer(None), max_seq_length=32)
    assert dataset.row_tokens == 64
    loader, seen = Loader(dataset.examples, dataset.row_tokens, True, 3, 0), []
    for _ in range(loader.num_batches(0)):
        batch = loader.next_batch()
        for part in split(batch, 40):
            ends = iter(part["cu_seqlens"][1:])
            start = 0
            for index in part["indices"]:
                example = dataset.examples[index]
                for length in example.lengths:
                    end = next(ends)
                    assert end - start == length
                    start = end
                begin = start - len(example.input_ids)
                assert part["input_ids"][0, begin:start].tolist() == example.input_ids
                seen.append(index)
            assert part["input_ids"].shape[1] % 64 == 0 or part is batch
    assert sorted(seen) == list(range(17))


def test_the_preview_shows_both_answers(tmp_path):
    from rich.console import Console

    tokenizer = make_tokenizer()
    path = write_rows(tmp_path / "d.jsonl", SAME[:2])
    dataset = load_dataset(str(path), tokenizer, DataConfig(), None)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render_preview(dataset, tokenizer, True, 1, False))
    text = console.export_text()
    for part in (
        "preference",
        ":1, chosen",
        ":1, rejected",
        "[[two blue mugs<|im_end|>]]",
        "[[the lazy dog<|im_end|>]]",
    ):
        assert part in text, part


TEXTS = {"chosen": GOOD["content"], "rejected": BAD["content"]}
SAID = [{"from": "human", "value": "how many mugs?"}]
CHATS = [  # of LLaMA-Factory and Axolotl
    {"messages": [USER], **TEXTS},
    {"messages": "how many mugs?", **TEXTS},
    {"instruction": "how many mugs?", "input": "", "history": [], **TEXTS},
    {"question": "how many mugs?", "system": "", **TEXTS},
    {"conversations": SAID, "chosen": {"from": "gpt", "value": "two blue mugs"},
     "rejected": {"from": "gpt", "value": "the lazy dog"}},
    {"messages": [USER, GOOD], "chosen": [USER, GOOD], "rejected": [USER, BAD]},  # in the answers, too
]  # fmt: skip


@pytest.mark.parametrize("row", CHATS, ids=range(len(CHATS)))
def test_a_prompt_that_is_a_chat_in_each_form_is_the_same(row, tmp_path):
    tokenizer = make_tokenizer()
    found, same = (load(tmp_path, rows).examples for rows in ([row], SAME[:1]))
    assert list(documents(found[0], tokenizer)) == list(documents(same[0], tokenizer))


def test_the_system_message_and_the_input_of_a_question_are_in_the_prompt(tmp_path):
    row = {"system": "Be short.", "instruction": "how many?", "input": "mugs", "history": [["hi", "hello"]], **TEXTS}
    (record,) = load(tmp_path, [row]).records
    assert [turn["content"] for turn in record.messages] == [
        "Be short.", "hi", "hello", "how many?\n\nmugs", "two blue mugs",
    ]  # fmt: skip
    assert record.num_prompt_messages == 4
    assert record.fields == ("system", "history[0][0]", "history[0][1]", "instruction", "chosen[0].content")
    row = {"system": "Be short.", "prompt": "how many mugs?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}
    (record,) = load(tmp_path, [row]).records
    assert [turn["role"] for turn in record.rejected.messages] == ["system", "user", "assistant"]
    with pytest.raises(UserError, match="one system message"):
        load(tmp_path, [{**row, "chosen": [{"role": "system", "content": "Be long."}, *row["chosen"]],
                         "rejected": [{"role": "system", "content": "Be long."}, *row["rejected"]]}])  # fmt: skip


def test_a_column_that_is_not_the_prompt_is_told(tmp_path):
    data = load(tmp_path, [{"messages": [USER, GOOD], "chosen": [USER, GOOD], "rejected": [USER, BAD]}])
    assert any('"messages" is not used' in notice for notice in data.notices)
    data = load(tmp_path, [{"prompt": "how many mugs?", "messages": [USER, GOOD], **TEXTS}])
    assert any('"messages" is not used' in notice for notice in data.notices) and next(iter(data.records)).prompt
    data = load(tmp_path, [{"messages": [USER], **TEXTS}])
    assert not any("not used" in notice for notice in data.notices)


JUDGED = [
    {"prompt": [USER], "completion": [GOOD], "label": False},
    {"messages": [USER, GOOD], "label": False},
    {"conversations": [*SAID, {"from": "gpt", "value": "two blue mugs"}], "kto_tag": False},
    {"instruction": "how many mugs?", "input": "", "output": "two blue mugs", "kto_tag": 0},
    {"messages": "how many mugs?", "completion": "two blue mugs", "label": "false"},
]


@pytest.mark.parametrize("row", JUDGED, ids=range(len(JUDGED)))
def test_a_judged_answer_in_each_form_is_the_same(row, tmp_path):
    (example,), (same,) = (load(tmp_path, rows, "kto").examples for rows in ([row], JUDGED[:1]))
    assert (example.input_ids, example.labels, example.label) == (same.input_ids, same.labels, False)
    with pytest.raises(UserError, match="must end with the answer"):
        load(tmp_path, [JUDGED[1], {**JUDGED[1], "messages": [USER]}], "kto")
