"""Exact: which tokens of a turn are learned, where templates and tokenizers make it hard to tell."""

import json

import pytest
from tokenizers import processors

from onecard.config import DataConfig
from onecard.data.chat.mask import encode, prompt_ids
from onecard.data.load import load_dataset
from onecard.data.records import Record, read_records
from onecard.errors import UserError
from tests.conftest import CHATML, make_tokenizer, write_rows
from tests.data.chat.test_mask import GEMMA, LLAMA3, MARKED, MISTRAL, NO_END, learned

# As Qwen3's: thoughts of turns before the last question are cut; the last answer gets an empty thought.
QWEN3 = r"""
{%- set ns = namespace(last=0) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{%- set content = m.content -%}{%- set thought = '' -%}
{%- if '</think>' in content -%}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') -%}
{%- set content = content.split('</think>')[-1].lstrip('\n') -%}
{%- endif -%}
{{- '<|im_start|>assistant\n' -}}
{%- if loop.index0 > ns.last and (loop.last or thought) -%}
{{- '<think>\n' + thought + '\n</think>\n\n' -}}
{%- endif -%}
{{- content -}}
{%- for c in m.tool_calls or [] -%}
{{- '\n<tool_call>\n{"name": "' + c.function.name + '", "arguments": ' + c.function.arguments | tojson -}}
{{- '}\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- else -%}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
# As gpt-oss's: the last answer ends otherwise than the earlier ones.
RETURNS = (
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|message|>{% endif %}"
)
# As DeepSeek-R1's: the generation prompt opens a thought that the history does not hold.
OPENS = (
    "{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% else %}<|Assistant|>"
    "{{ m.content.split('</think>')[-1] }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
# The end of turn is written between turns only.
BETWEEN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if not loop.last %}{{ eos_token }}{% endif %}{% endfor %}"
)
UNLISTED = "{% for m in messages %}<|start|>{{ m.role }}:{{ m.content }}<|over|>\n{% endfor %}"
END = "<|im_end|>"


def chat(*contents, **fields):
    turns = [c if isinstance(c, dict) else {"role": ("user", "assistant")[i % 2], "content": c}
             for i, c in enumerate(contents)]  # fmt: skip
    return Record("f.jsonl", 1, messages=tuple(turns), **fields)


def learned_of(record, template, specials=(), trim=False):
    tokenizer = make_tokenizer(template, specials)
    if trim:  # as Llama 3's tokenizer: offsets leave out spaces, so a token of spaces has no width
        tokenizer._tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return learned(encode(record, tokenizer, 512), tokenizer)


@pytest.mark.parametrize("trim", [False, True])
def test_indentation_is_learned(trim):
    """Every token of the answer, spaces at its start, middle and end too."""
    tokenizer = make_tokenizer(CHATML)
    tokenizer._tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    answer = "  two:\n        mugs   "
    example = encode(chat("how?", answer), tokenizer, 512)
    assert tokenizer.decode([label for label in example.labels if label != -100]) == answer + END


def test_a_template_of_many_turns_learns_each():
    record = chat("how?", "<think>fox</think>\n\ntwo", "more?", "<think>\ndog\n</think>\n\nlazy")
    expected = [f"two{END}", f"<think>\ndog\n</think>\n\nlazy{END}"]
    assert learned_of(record, QWEN3) == expected


def test_what_follows_the_generation_prompt_is_learned():
    """The empty thought is the model's to write: generation starts before it."""
    tokenizer = make_tokenizer(QWEN3)
    example = encode(chat("how?", "two"), tokenizer, 512)
    prompt = prompt_ids([{"role": "user", "content": "how?"}], tokenizer)
    assert example.input_ids[: len(prompt)] == prompt
    assert example.labels[: len(prompt)] == [-100] * len(prompt)
    text = tokenizer.decode([label for label in example.labels if label != -100])
    assert text == f"<think>\n\n</think>\n\ntwo{END}"


@pytest.mark.parametrize("content", ["", "fox"])
def test_tool_calls_are_learned(content):
    call = {"function": {"name": "count", "arguments": {"of": "mugs"}}}
    record = chat(
        "how?",
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "two"},
    )
    spoken = f'{content}\n<tool_call>\n{{"name": "count", "arguments": {{"of": "mugs"}}}}\n</tool_call>{END}'
    assert learned_of(record, QWEN3) == [spoken.strip(), f"<think>\n\n</think>\n\ntwo{END}"]


def test_tool_calls_whose_place_is_not_certain_are_refused():
    """The last turn first: where the call ends is known, not what asks for it."""
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    template = "{% for m in messages | reverse %}{{ m.content }}{{ m.tool_calls | string }}{{ eos_token }}{% endfor %}"
    with pytest.raises(UserError, match="not there for certain"):
        encode(chat("how?", call), make_tokenizer(template), 512)


def test_a_last_answer_that_ends_otherwise():
    specials = ("<|start|>", "<|message|>", "<|end|>", "<|return|>")
    assert learned_of(chat("a", "two", "b", "fox"), RETURNS, specials) == ["two<|end|>", "fox<|return|>"]


def test_a_generation_prompt_that_the_history_does_not_hold():
    specials = ("<|User|>", "<|Assistant|>")
    assert learned_of(chat("a", "two", "b", "fox"), OPENS, specials) == [f"two{END}", f"fox{END}"]


def test_an_end_between_turns_is_learned_and_the_last_is_added():
    assert learned_of(chat("a", "two", "b", "fox"), BETWEEN) == [f"two{END}", f"fox{END}"]


def test_an_end_that_no_list_names_is_learned_and_eos_is_not_added():
    assert learned_of(chat("a", "two"), UNLISTED, ("<|start|>", "<|over|>")) == ["two<|over|>"]


def test_eos_comes_right_after_the_last_answer_only():
    tokenizer = make_tokenizer(NO_END)
    text = tokenizer.decode(encode(chat("how?", "two"), tokenizer, 512).input_ids)
    assert text == f"user: how?\nassistant: two{END}"
    asked_again = encode(chat("how?", "two", "more?"), tokenizer, 512)
    assert learned(asked_again, tokenizer) == ["two"] and tokenizer.eos_token_id not in asked_again.input_ids


@pytest.mark.parametrize("trim", [False, True])
def test_generation_markers_hold_where_offsets_are_trimmed(trim):
    """Where transformers' own mask is cut off: the first block begins with a space."""
    record = chat("how?", " two  ", "the fox", "dog")
    assert learned_of(record, MARKED, trim=trim) == [f"two  {END}", f"dog{END}"]


def test_generation_markers_keep_the_white_space_around_them():
    template = (
        "{% for m in messages %}\n{% if m.role == 'assistant' %}\n"
        "A:  {%- generation -%}\n  {{ m.content }}{{ eos_token }}\n{% endgeneration %}\n"
        "{% else %}\nU:{{ m.content }}\n{% endif %}\n{% endfor %}"
    )
    assert learned_of(chat("how?", "two", "more?", "fox"), template) == [f"two{END}", f"fox{END}"]


def test_markers_for_some_turns_only_are_refused():
    template = MARKED.replace("m.role == 'assistant'", "m.role == 'assistant' and loop.last")
    with pytest.raises(UserError, match="not there for certain"):
        encode(chat("how?", "two", "more?", "fox"), make_tokenizer(template), 512)


@pytest.mark.parametrize("template", [CHATML, MISTRAL, MARKED])
def test_a_prompt_of_messages_is_not_learned(template, tmp_path):
    turns = [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(["how?", "fox", "so?", "two"])]
    path = write_rows(tmp_path / "d.jsonl", [{"prompt": turns[:3], "completion": turns[3:]}])
    record = read_records(path).records[0]
    assert record.num_prompt_messages == 3
    assert learned_of(record, template) == [f"two{END}"]


def test_words_of_the_user_are_not_mistaken_for_the_assistants():
    """The template drops this answer; the user said the same words."""
    template = (
        "{% for m in messages %}{{ m.role }}:{{ '' if m.content == 'two' and m.role == 'assistant' else m.content }}"
        "\n{% endfor %}"
    )
    with pytest.raises(UserError, match="must write all words"):
        encode(chat("say two", "two"), make_tokenizer(template), 512)


@pytest.mark.parametrize("template", [CHATML, LLAMA3, GEMMA, MISTRAL, MARKED, NO_END, QWEN3, RETURNS, BETWEEN])
def test_training_starts_as_generation_does(template):
    """The prompt of generation is a prefix of the example, and nothing of it is learned."""
    tokenizer = make_tokenizer(template, ("<|eot_id|>", "<end_of_turn>", "<start_of_turn>"))
    example = encode(chat("how many?", "two mugs"), tokenizer, 512)
    prompt = prompt_ids([{"role": "user", "content": "how many?"}], tokenizer)
    assert example.input_ids[: len(prompt)] == prompt and set(example.labels[: len(prompt)]) == {-100}
    assert example.num_supervised > 0


def test_bos_after_white_space_is_not_doubled():
    tokenizer = make_tokenizer("\n{{- '\n' -}}" + CHATML)
    bos = tokenizer.bos_token_id
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", bos)]
    )
    assert encode(chat("a", "b"), tokenizer, 512).input_ids.count(bos) == 1
    assert prompt_ids([{"role": "user", "content": "a"}], tokenizer).count(bos) == 1


def test_a_mark_in_the_chat_is_refused_not_mistaken():
    with pytest.raises(UserError, match="not there for certain"):
        encode(chat("\u20421\u2042", "two"), make_tokenizer(NO_END), 512)


def test_a_mark_said_by_the_user_is_not_learned_for_an_answer_that_is_not_there():
    template = "{% for m in messages %}{{ m.role }}:{{ m.content if m.role == 'user' else '' }}\n{% endfor %}"
    with pytest.raises(UserError, match="not there for certain"):
        encode(chat("\u20421\u2042", "two"), make_tokenizer(template), 512)


def test_a_template_that_changes_the_order_is_refused():
    template = "{% for m in messages | reverse %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
    with pytest.raises(UserError, match="not there for certain"):
        encode(chat("how?", "two", "more?", "fox"), make_tokenizer(template), 512)


WITH_TOOLS = (
    "{% if tools %}Tools: {% for t in tools %}{{ t.name }} {% endfor %}\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def read_one(tmp_path, row, template=CHATML):
    tokenizer = make_tokenizer(template)
    return load_dataset(str(write_rows(tmp_path / "d.jsonl", [row])), tokenizer, DataConfig()), tokenizer


def test_a_message_of_weight_0_is_read_but_not_learned(tmp_path):
    turns = [("user", "a"), ("assistant", "first"), ("user", "b"), ("assistant", "second")]
    messages = [{"role": role, "content": content} for role, content in turns]
    messages[1]["weight"] = 0
    dataset, tokenizer = read_one(tmp_path, {"messages": messages})
    example = dataset.examples[0]
    learned = tokenizer.decode([t for t, label in zip(example.input_ids, example.labels) if label != -100])
    assert learned == "second<|im_end|>"
    assert "first" in tokenizer.decode(example.input_ids)


@pytest.mark.parametrize("weight, role", [(0.5, "assistant"), ("0", "assistant"), (1, "user"), (0, "assistant")])
def test_bad_weights(tmp_path, weight, role):
    """The last case: nothing is left to learn."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    messages[role == "assistant"]["weight"] = weight
    with pytest.raises(UserError, match=r"d\.jsonl:1:messages"):
        read_one(tmp_path, {"messages": messages})


@pytest.mark.parametrize("as_text", [True, False])
def test_tools_reach_the_template(tmp_path, as_text):
    tools = [{"name": "weather"}, {"name": "clock"}]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    row = {"messages": messages, "tools": json.dumps(tools) if as_text else tools}
    dataset, tokenizer = read_one(tmp_path, row, WITH_TOOLS)
    example = dataset.examples[0]
    assert tokenizer.decode(example.input_ids).startswith("Tools: weather clock <|im_start|>")
    learned = tokenizer.decode([t for t, label in zip(example.input_ids, example.labels) if label != -100])
    assert learned == "b<|im_end|>"


@pytest.mark.parametrize("tools", ["{", {"name": "x"}, [1], 3, [{"name": "<|im_end|>"}]])
def test_bad_tools(tmp_path, tools):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(UserError, match=r"d\.jsonl:1:tools"):
        read_one(tmp_path, {"messages": messages, "tools": tools}, WITH_TOOLS)


def test_a_header_that_follows_every_turn_is_not_learned():
    """A template that writes the generation prompt whether or not it is asked for."""
    always = CHATML.replace("{% if add_generation_prompt %}", "{% if true %}")
    assert learned_of(chat("how?", "two", "more?", "lazy dog"), always) == [f"two{END}", f"lazy dog{END}"]
