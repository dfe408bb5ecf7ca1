"""Exact: the user's chat template and variables, and the turns that are learned."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from onecard.adapter.origin import form_beside
from onecard.config import DataConfig, TrainConfig, make_config
from onecard.data.chat.mask import IGNORE, encode, prompt_ids
from onecard.data.chat.template import set_template
from onecard.data.load import load_dataset
from onecard.data.records import Record
from onecard.errors import UserError
from onecard.hf.load import load_tokenizer
from onecard.terminal import make_console
from onecard.train.session import run_training
from tests.conftest import make_tokenizer, write_rows

ASKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
CHAT = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, ("a", "one", "b", "two"))]
FIELDS = {"max_seq_length": 96, "sample_prompts": [], "max_steps": 1, "gradient_accumulation_steps": 1, "r": 4}


def labels_of(train_on: str, **fields) -> tuple[str, str]:
    """Text of the whole example and of what is learned."""
    tokenizer = make_tokenizer(ASKS)
    example = encode(Record("f", 1, messages=tuple(CHAT), **fields), tokenizer, 200, train_on)
    learned = [label for label in example.labels if label != IGNORE]
    return tokenizer.decode(example.input_ids), tokenizer.decode(learned)


def test_the_last_turn_or_everything_is_learned_where_asked():
    assert labels_of("completion")[1] == "one<|im_end|>two<|im_end|>"
    assert labels_of("last")[1] == "two<|im_end|>"
    assert labels_of("last", unlearned=(3,))[1] == "one<|im_end|>"  # the last one that has a weight
    whole, learned = labels_of("all")
    assert learned == whole.removeprefix("<|im_start|>")  # no token precedes the first
    with pytest.raises(UserError, match=r"f:1:messages\[1\]"):
        labels_of("all", unlearned=(1,))


@pytest.mark.parametrize("text", [ASKS, f"\n  {ASKS}", f"  {{% set x = 1 %}}\n{ASKS}{{{{ x }}}}"])
def test_variables_are_defaults_for_every_tool(text, tmp_path):
    plain, tokenizer = make_tokenizer(text), make_tokenizer(text)
    assert set_template(tokenizer, None, {"enable_thinking": False})
    tokenizer.save_pretrained(tmp_path)
    read = AutoTokenizer.from_pretrained(tmp_path)
    for value in (False, True):
        how = {"tokenize": False, "add_generation_prompt": True}
        expected = plain.apply_chat_template(CHAT[:1], **how, enable_thinking=value)
        assert read.apply_chat_template(CHAT[:1], **how, enable_thinking=value) == expected
        if value is False:
            assert read.apply_chat_template(CHAT[:1], **how) == expected and "</think>" in expected
            assert tokenizer.decode(prompt_ids(CHAT[:1], tokenizer)).endswith(expected)


@pytest.mark.parametrize("value", [None, True, 3, -0.5, 'it\'s "é"\n{% x %}', [1, None, {"a": [False]}], {}])
def test_values_arrive_as_they_are(value):
    tokenizer = make_tokenizer("{{ given | tojson }}{% for m in messages %}{{ m.content }}{% endfor %}")
    set_template(tokenizer, None, {"given": value})
    text = tokenizer.apply_chat_template(CHAT[:1], tokenize=False)
    assert json.loads(text.removesuffix("a")) == value


def test_wrong_variables_and_files_are_refused(tmp_path):
    with pytest.raises(UserError, match=r'"enable_thinkin" .did you mean "enable_thinking"'):
        set_template(make_tokenizer(ASKS), None, {"enable_thinkin": False})
    with pytest.raises(UserError, match="variables of the chat template"):
        set_template(make_tokenizer(ASKS), None, {"messages": []})
    with pytest.raises(UserError, match="none in the tokenizer"):
        set_template(make_tokenizer(None), None, {"x": 1})
    (tmp_path / "words").write_text("words")
    for name in ("absent", "words"):
        with pytest.raises(UserError, match="must be a UTF-8 file of Jinja"):
            set_template(make_tokenizer(ASKS), str(tmp_path / name), {})
    for text in ("[1]", "{", "3"):
        with pytest.raises(UserError, match="JSON object"):
            make_config(DataConfig, {"chat_template_kwargs": text})


def test_a_run_saves_its_own_template_with_the_adapter(checkpoint, tmp_path):
    (file := tmp_path / "asks.jinja").write_text(ASKS)
    data = write_rows(tmp_path / "d.jsonl", [{"messages": CHAT}] * 4)
    own = {"chat_template": str(file), "chat_template_kwargs": '{"enable_thinking": false}'}
    fields = {"model": str(checkpoint), "data": str(data), "output": str(tmp_path / "o"), **FIELDS, **own}
    config = make_config(TrainConfig, fields)
    adapter = run_training(config, False, make_console(quiet=True)).adapter
    tokenizer = load_tokenizer(str(checkpoint), adapter)
    asked = tokenizer.decode(prompt_ids(CHAT[:1], tokenizer))
    assert asked.endswith("assistant\n<think>\n\n</think>\n\n")
    form = form_beside(adapter)
    assert form is not None and form.prompt == "chat"
    again = load_dataset(str(data), tokenizer, DataConfig())  # nothing is said again: the adapter's tokenizer has it
    trained = make_tokenizer(ASKS)
    set_template(trained, None, {"enable_thinking": False})
    assert again.fingerprint() == load_dataset(str(data), trained, DataConfig()).fingerprint()
    assert not Path(tmp_path / "o/adapter/config.json").exists()
