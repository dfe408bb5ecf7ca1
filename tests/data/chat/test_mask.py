"""Exact: which tokens are learned, for templates of every kind."""

import json

import pytest
from tokenizers import Tokenizer

from onecard.config import DataConfig
from onecard.data.chat.mask import IGNORE, encode, prompt_ids
from onecard.data.load import load_dataset
from onecard.data.records import Record
from onecard.errors import UserError
from tests.conftest import CHATML, make_tokenizer, write_rows

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|end_header|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|end_header|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last and '</think>' in "
    "m.content %}{{ m.content.split('</think>')[-1].lstrip('\\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}{% else %}U:{{ m.content }}\n{% endif %}{% endfor %}"
)
NO_END = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
TEMPLATES = {
    "chatml": (CHATML, (), "<|im_end|>"),
    "llama3": (LLAMA3, ("<|start|>", "<|end_header|>", "<|eot_id|>"), "<|eot_id|>"),
    "gemma": (GEMMA, ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
    "mistral": (MISTRAL, (), "<|im_end|>"),
    "thinking": (THINKING, (), "<|im_end|>"),
    "marked": (MARKED, (), "<|im_end|>"),
    "no end": (NO_END, (), "<|im_end|>"),
}


def record(*contents):
    roles = ("user", "assistant")
    return Record("f.jsonl", 1, messages=tuple({"role": roles[i % 2], "content": c} for i, c in enumerate(contents)))


def learned(example, tokenizer):
    """The learned stretches as text."""
    found, open_ = [], False
    for token, label in zip(example.input_ids, example.labels):
        if label != IGNORE:
            assert label == token
            if not open_:
                found.append([])
            found[-1].append(token)
        open_ = label != IGNORE
    return [tokenizer.decode(ids).strip() for ids in found]


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_the_assistants_words_and_their_end_are_learned(name):
    template, specials, end = TEMPLATES[name]
    tokenizer = make_tokenizer(template, specials)
    example = encode(record("how many?", "two blue mugs"), tokenizer, 512)
    text = "".join(learned(example, tokenizer))
    assert text.replace("\n", "") == f"two blue mugs{end}"
    bos = example.input_ids.count(tokenizer.bos_token_id)
    assert bos == (1 if "bos_token" in template else 0)


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "mistral", "marked"])
def test_all_turns_are_learned_even_when_they_repeat(name):
    template, specials, end = TEMPLATES[name]
    tokenizer = make_tokenizer(template, specials)
    example = encode(record("two", "two", "two", "two", "fox", "dog"), tokenizer, 512)
    assert learned(example, tokenizer) == [f"two{end}", f"two{end}", f"dog{end}"]


def test_thoughts_that_the_template_drops_are_not_learned():
    tokenizer = make_tokenizer(THINKING)
    example = encode(record("how?", "<think>fox</think>\ntwo", "more?", "dog"), tokenizer, 512)
    assert learned(example, tokenizer) == ["two<|im_end|>", "dog<|im_end|>"]
    assert "<think>" not in tokenizer.decode(example.input_ids)


@pytest.mark.parametrize(
    "body", ["{{ m.content }}{{ m.content }}", "{{ m.content | length }}", "{{ m.content | upper }}"]
)
def test_a_template_whose_words_cannot_be_found_is_refused(body):
    tokenizer = make_tokenizer("{% for m in messages %}" + body + "{% endfor %}")
    with pytest.raises(UserError, match=r"must (be found|write all words)"):
        encode(record("how?", "two mugs"), tokenizer, 512)


def test_a_template_that_refuses_the_roles_is_a_bad_row(tmp_path):
    tokenizer = make_tokenizer(GEMMA, ("<start_of_turn>", "<end_of_turn>"))
    turns = [("system", "s"), ("user", "how?"), ("assistant", "two")]
    path = write_rows(tmp_path / "d.jsonl", [{"messages": [{"role": r, "content": c} for r, c in turns]}])
    with pytest.raises(UserError, match=r"d\.jsonl:1:messages.*\n.*System role"):
        load_dataset(str(path), tokenizer, DataConfig())


def test_a_chat_without_a_template_is_refused():
    with pytest.raises(UserError, match="chat template"):
        encode(record("a", "b"), make_tokenizer(None), 512)


@pytest.mark.parametrize("writes_bos", [True, False])
def test_prompt_and_completion_are_verbatim(writes_bos):
    tokenizer = make_tokenizer()
    if writes_bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer._tokenizer.post_processor = TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.bos_token_id)]
        )
    example = encode(Record("f", 1, prompt="two blue", completion=" mugs"), tokenizer, 512)
    text = tokenizer.decode(example.input_ids)
    assert text == ("<|bos|>" if writes_bos else "") + "two blue mugs<|im_end|>"
    assert learned(example, tokenizer) == ["mugs<|im_end|>"]
    assert example.labels[0] == IGNORE


def test_bos_is_added_once_where_the_template_forgets_it():
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(NO_END)
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.bos_token_id)]
    )
    for ids in (
        encode(record("a", "b"), tokenizer, 512).input_ids,
        prompt_ids([{"role": "user", "content": "a"}], tokenizer),
    ):
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1


def test_a_pad_token_that_is_eos_takes_nothing_away():
    tokenizer = make_tokenizer(pad_token="<|im_end|>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    example = encode(record("how many?", "two"), tokenizer, 512)
    assert learned(example, tokenizer) == ["two<|im_end|>"]


def test_truncation_is_counted_and_nothing_left_is_an_error(tmp_path):
    rows = [{"prompt": "the lazy dog " * 20, "completion": "mugs"}, {"prompt": "two", "completion": "the fox " * 30}]
    path = write_rows(tmp_path / "d.jsonl", rows)
    dataset = load_dataset(str(path), make_tokenizer(), DataConfig(max_seq_length=16))
    assert (dataset.num_truncated, dataset.num_unsupervised, len(dataset.examples)) == (2, 1, 1)
    write_rows(path, rows[:1])
    with pytest.raises(UserError, match="token to learn"):
        load_dataset(str(path), make_tokenizer(), DataConfig(max_seq_length=16))


def test_no_token_joins_the_prompt_to_the_answer():
    """A tokenizer with a token for newline and brace: generation ends its prompt before it, so learning must too."""
    tokenizer = make_tokenizer()
    assert len(tokenizer('\n{"', add_special_tokens=False)["input_ids"]) > 1
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    backend["model"]["vocab"]["Ċ{"] = len(backend["model"]["vocab"])
    backend["model"]["merges"].append(["Ċ", "{"])
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(backend))
    joined = tokenizer.convert_tokens_to_ids("Ċ{")
    assert joined in tokenizer('\n{"', add_special_tokens=False)["input_ids"]
    turns = ("a", '{"b": 1}', "c", '{"d": 2}')
    example = encode(record(*turns), tokenizer, 512)
    assert joined not in example.input_ids
    assert learned(example, tokenizer) == ['{"b": 1}<|im_end|>', '{"d": 2}<|im_end|>']
    prompt = prompt_ids([{"role": "user", "content": "a"}], tokenizer)
    assert example.input_ids[: len(prompt)] == prompt
