"""Exact: the pieces of a long text are its tokens, and text that the chat template wrote has the template's tokens."""

from itertools import chain

import pytest

from onecard.config import DataConfig
from onecard.data.chat.mask import IGNORE, Example, encode
from onecard.data.load import load_dataset
from onecard.data.records import Record
from onecard.data.tokens import pieces
from onecard.errors import UserError
from onecard.train.samples import make_samples
from tests.conftest import chat_rows, make_tokenizer, write_rows

TOKENIZER = make_tokenizer()


def loaded(folder, rows, **settings):
    return load_dataset(str(write_rows(folder / "d.jsonl", rows)), TOKENIZER, DataConfig(**settings))


@pytest.mark.parametrize("most", range(8, 20))
def test_the_pieces_of_a_text_are_its_tokens(most, tmp_path):
    rows = [{"text": "the lazy dog " * count + "x" * extra} for count in (1, 9, 20) for extra in range(9)]
    dataset = loaded(tmp_path, rows, max_seq_length=most)
    for line, row in enumerate(rows, 1):
        whole = encode(Record("d", line, text=row["text"]), TOKENIZER, 10**6)
        found = [example for example in dataset.examples if example.where.endswith(f":{line}")]
        assert list(chain(*(example.input_ids for example in found))) == whole.input_ids
        assert all(2 <= len(example.input_ids) <= most for example in found)
        assert all(len(example.input_ids) >= most - 1 for example in found[:-1])
        assert all(e.labels == [IGNORE, *e.input_ids[1:]] and not e.truncated for e in found)
    assert dataset.num_records == len(rows) and dataset.num_truncated == 0
    assert len(list(dataset.records)) == len(dataset.examples)
    assert any("split into pieces" in notice for notice in dataset.notices)


@pytest.mark.parametrize("most", range(8, 20))
def test_a_piece_is_never_one_token(most):
    for length in range(2, 4 * most):
        ids = list(range(length))
        found = pieces(Example(ids, [IGNORE, *ids[1:]], "d:1"), most)
        assert list(chain(*(piece.input_ids for piece in found))) == ids
        assert all(2 <= len(piece.input_ids) <= most for piece in found)
        assert len(found) == -(-length // most)  # as few as possible


@pytest.mark.parametrize("how, num_examples", [("cut", 1), ("drop", None), ("error", None), ("auto", 8), ("split", 8)])
def test_long_texts(how, num_examples, tmp_path):
    rows = [{"text": "the lazy dog " * 20}, {"text": "two mugs"}]
    size = len(encode(Record("d", 1, text=rows[0]["text"]), TOKENIZER, 10**6).input_ids)
    config = {"max_seq_length": -(-size // 8), "on_long_rows": how}
    if how == "error":
        with pytest.raises(UserError, match=r"d\.jsonl:1:row: a row must have at most"):
            loaded(tmp_path, rows, **config)
        return
    dataset = loaded(tmp_path, rows, **config)
    assert len(dataset.examples) == (num_examples or 0) + 1 and dataset.num_records == 2


def test_a_chat_is_cut_and_never_split(tmp_path):
    rows = [{"prompt": "two", "completion": "the fox " * 30}]
    assert loaded(tmp_path, rows, max_seq_length=16).num_truncated == 1
    with pytest.raises(UserError, match="only rows of text can be split"):
        loaded(tmp_path, rows, max_seq_length=16, on_long_rows="split")


def test_a_text_is_on_one_side_of_a_validation_split(tmp_path):
    dataset = loaded(tmp_path, [{"text": f"{i} the lazy dog " * 60} for i in range(6)], max_seq_length=96)
    rest, held = dataset.split(0.3, 7)
    assert {e.where for e in rest.examples}.isdisjoint(e.where for e in held.examples)
    assert (rest.num_documents, held.num_documents) == (4, 2)
    assert len({text for text, _ in make_samples(None, dataset, TOKENIZER)}) > 1  # not one text's pieces


def templated(messages):
    return TOKENIZER.apply_chat_template(messages, tokenize=False)


def test_templated_text_has_the_tokens_of_the_chat(tmp_path):
    rows = chat_rows(4)
    chats = loaded(tmp_path, rows)
    texts = [{"text": templated(row["messages"])} for row in rows]
    dataset = loaded(tmp_path, texts, text_is_templated=True)
    assert [e.input_ids for e in dataset.examples] == [
        e.input_ids[: len(mine.input_ids)] for e, mine in zip(chats.examples, dataset.examples)
    ]
    first = dataset.examples[0]
    bos, end = TOKENIZER.bos_token_id, TOKENIZER.convert_tokens_to_ids("<|im_end|>")
    assert first.input_ids.count(bos) == first.input_ids[:1].count(bos) == 1 and first.input_ids[-1] == end
    assert first.labels == [IGNORE, *first.input_ids[1:]]
    assert "all tokens of templated text are learned" in dataset.notices[0]


def test_templated_text_without_its_end(tmp_path):
    text = templated(chat_rows(1)[0]["messages"]).removeprefix(TOKENIZER.bos_token) + "how many"
    ids = loaded(tmp_path, [{"text": text}], text_is_templated=True).examples[0].input_ids
    assert ids[0] != TOKENIZER.bos_token_id  # the tokenizer itself writes none
    assert ids[-1] == TOKENIZER.eos_token_id
    dataset = loaded(tmp_path, [{"text": "two mugs"}], text_is_templated=True)
    assert any("no control token" in notice for notice in dataset.notices)


def test_templated_text_must_be_said(tmp_path):
    text = templated(chat_rows(1)[0]["messages"])
    with pytest.raises(UserError, match="--text-is-templated"):
        loaded(tmp_path, [{"text": text}])
    with pytest.raises(UserError, match="rows of messages"):
        loaded(tmp_path, chat_rows(1), text_is_templated=True)
    with pytest.raises(UserError, match="for format text"):
        DataConfig(text_is_templated=True, format="alpaca")
