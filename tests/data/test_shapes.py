"""Exact: every word of a row is in what is learned or read, over templates with the peculiarities of public ones."""

import pytest

from onecard.config import DataConfig
from onecard.data.chat import mask as module
from onecard.data.chat.mask import IGNORE, NO_THOUGHTS, OTHER_PROMPT, prompt_ids
from onecard.data.load import load_dataset
from onecard.errors import UserError
from tests.conftest import CHATML, make_tokenizer, write_rows

PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# Parts of text only, as Idefics, LLaVA and the first Mistral Small 3.1.
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}" + PROMPT
)
# Parts in the system message only.
PARTS_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}S:{{ m.content[0]['text'] }};{% else %}"
    "<|im_start|>{{ m.role }}\n{{ m.content + '' }}<|im_end|>\n{% endif %}{% endfor %}" + PROMPT
)
# Arguments joined to text, as DeepSeek R1 and V3.
ARGUMENTS_AS_TEXT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name + ' ' + c.function.arguments }}{% endfor %}<|im_end|>\n{% endfor %}" + PROMPT
)
# The same with ~, which writes an object as Python does, without an error.
ARGUMENTS_JOINED = ARGUMENTS_AS_TEXT.replace("+ c.function.arguments", "~ c.function.arguments")
# Thoughts under the key of gpt-oss.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.thinking %}({{ m.thinking }}){% endif %}{{ m.content }}"
    "<|im_end|>\n{% endfor %}" + PROMPT
)
# Cuts thoughts at </think> and opens one in the generation prompt, as DeepSeek-R1's distills.
R1 = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}{% else %}A:"
    "{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A:<think>\n{% endif %}"
)
# The system message before a last user's message only, as Mistral 7B v0.3 and Nemo.
LAST_SYSTEM = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{% for m in rest %}{% if m.role == 'user' %}[INST] "
    "{{ (system + '\n\n' if loop.last and system is defined else '') + m.content }}[/INST]{% else %} "
    "{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
# Tools before a last user's message only.
LAST_TOOLS = LAST_SYSTEM.replace(
    "[INST] ", "{% if loop.last and tools %}[T]{{ tools | tojson }}[/T]{% endif %}[INST] "
).replace("{{ m.content + eos_token }}", "{{ m.content }}{{ eos_token }}")
# Knows tools without the function around them.
BARE_TOOLS = "{% for t in tools or [] %}{{ t.name }};{% endfor %}" + CHATML.replace("{{ bos_token }}", "")
# Always opens a thought in the prompt, and writes an empty one where there is none, as Qwen3's thinking models.
OPENS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n"
    "{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# Drops thoughts of turns before the last, as Qwen3's.
HISTORY = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content and loop.last %}<think>"
    "{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}" + PROMPT
)
# Always writes an empty thought, as SmolLM3 does without thinking.
EMPTY_THOUGHT = CHATML.replace(
    "+ m['content']", "+ ('<think>\\n\\n</think>\\n' if m.role == 'assistant' else '') + m['content']"
)
# Trims content, indents it otherwise, or writes a tool's answer as JSON.
TRIMS = CHATML.replace("m['content']", "(m['content'] | trim)")
TOJSON = CHATML.replace("m['content']", "(m['content'] | tojson if m.role == 'tool' else m['content'])")
# Leaves out a message of a role that it does not know, or the system message.
ONLY_TWO = CHATML.replace("{{ '<|im_start|>' +", "{{ '' if m.role not in ('user', 'assistant') else '<|im_start|>' +")
# Never writes what a call asks for, as SmolLM2's and Phi-4's.
NO_TOOLS = CHATML.replace("m['content']", "(m['content'] or '')")
NAME_ONLY = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    "[{{ c.function.name }}]{% endfor %}<|im_end|>\n{% endfor %}" + PROMPT
)

# No generation prompt; tools before the last user's message, calls in place of the answer, as Mistral 7B v0.3.
MISTRAL_CALLS = (
    "{% set users = messages | selectattr('role', 'equalto', 'user') | list %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% if tools and m == users[-1] %}[TOOLS]{{ tools | tojson }}[/TOOLS]{% endif %}"
    "[INST] {{ m.content }}[/INST]{% elif m.role == 'tool' %}[RESULT]{{ m.content }}[/RESULT]{% elif m.tool_calls %}"
    "[CALLS][{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}]{{ eos_token }}{% else %}"
    " {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
# Calls only of a message without a content, as DeepSeek-R1's distills.
NO_CONTENT = (
    "{% for m in messages %}{% if m.role == 'assistant' and m['content'] is none %}A:"
    "{{ m.tool_calls[0].function.name }}{{ m.tool_calls[0].function.arguments | tojson }}"
    "{{ eos_token }}{% elif m.role == 'assistant' %}A:{{ m.content }}"
    "{{ eos_token }}{% else %}<|im_start|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A:<think>\n{% endif %}"
)
# A prompt that closes an empty thought, as Qwen3.5's without thinking.
CLOSED = OPENS.replace("<think>\n{% endif %}", "<think>\n\n</think>\n\n{% endif %}")
# Raises on roles that it does not know.
THREE_ROLES = CHATML.replace(
    "{% for m in messages %}",
    "{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant') %}{{ raise_exception('role') }}"
    "{% endif %}",
)
# The end of the last turn in a block of its own, as trl writes Phi-3's.
TWO_BLOCKS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}\n<|im_start|>assistant\n{% endif %}{% endfor %}"
    "{% if messages[-1].role == 'assistant' %}{% generation %}{{ eos_token }}{% endgeneration %}{% endif %}"
)

USER, ANSWER = {"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "Five."}
ASKED_MORE = {"role": "user", "content": "And then?"}
SYSTEM = {"role": "system", "content": "Be brief."}
FUNCTION = {"name": "find_ship", "arguments": {"port": "Kiel", "deep": {"all": [1, True, "é"]}}}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": FUNCTION}]}
TOOL = {"type": "function", "function": {"name": "find_ship", "parameters": {"type": "object", "properties": {}}}}
THOUGHT = {"role": "assistant", "content": "Five.", "reasoning_content": "Two and three."}
INLINE = {"role": "assistant", "content": "<think>\nTwo and three.\n</think>\n\nFive."}
RETURNED = {"role": "tool", "content": 'a "b"'}
CALLED = '{"name": "find_ship", "arguments": {"port": "Kiel", "deep": {"all": [1, true, "é"]}}}'
JSON = '{"port": "Kiel", "deep": {"all": [1, true, "é"]}}'
END = "<|im_end|>"

# name: (template, messages, tools, what is learned, of the whole text)
WRITTEN = {
    "parts": (PARTS, [SYSTEM, USER, ANSWER], None, f"Five.{END}", "Be brief."),
    "parts of the system message": (PARTS_SYSTEM, [SYSTEM, USER, ANSWER], None, f"Five.{END}", "S:Be brief.;"),
    "arguments as text": (ARGUMENTS_AS_TEXT, [USER, CALL], None, f"find_ship {JSON}{END}", ""),
    "arguments joined": (ARGUMENTS_JOINED, [USER, CALL], None, f"find_ship {JSON}{END}", ""),
    "thinking": (THINKING, [USER, THOUGHT], None, f"(Two and three.)Five.{END}", ""),
    "thoughts that are cut": (R1, [USER, INLINE], None, f"Two and three.\n</think>\n\nFive.{END}", "A:<think>\nTwo"),
    "thoughts of a field that are cut": (R1, [USER, THOUGHT], None, f"Two and three.\n</think>\n\nFive.{END}", "A:<th"),
    "system before the last user": (LAST_SYSTEM, [SYSTEM, USER, ANSWER], None, f"Five.{END}", "[INST] Be brief."),
    "tools before the last user": (LAST_TOOLS, [USER, ANSWER], [TOOL], f"Five.{END}", "[T][{"),
    "bare tools": (BARE_TOOLS, [USER, ANSWER], [TOOL], f"Five.{END}", "find_ship;"),
    "thought opened": (OPENS, [USER, THOUGHT], None, f"Two and three.\n</think>\n\nFive.{END}", "<think>\nTwo"),
    "no thought, opened": (OPENS, [USER, ANSWER], None, f"\n</think>\n\nFive.{END}", ""),
    "trimmed": (TRIMS, [{**USER, "content": " 2+3?\n"}, ANSWER], None, f"Five.{END}", "\n2+3?<"),
    "tool's answer as JSON": (
        TOJSON,
        [USER, {"role": "tool", "content": 'a "b"'}, ANSWER],
        None,
        f"Five.{END}",
        '\\"b',
    ),
    "calls without a generation prompt": (
        MISTRAL_CALLS,
        [USER, CALL],
        [TOOL],
        f"[CALLS][{CALLED}]{END}",
        "[TOOLS]",
    ),
    "thoughts of the content behind a prompt that opens one": (
        OPENS,
        [USER, INLINE],
        None,
        f"Two and three.\n</think>\n\nFive.{END}",
        "<think>\nTwo",
    ),
    "developer": (
        THREE_ROLES,
        [{**SYSTEM, "role": "developer"}, USER, ANSWER],
        None,
        f"Five.{END}",
        "system\nBe brief.",
    ),
    "a block for the end of turn": (TWO_BLOCKS, [USER, ANSWER], None, f"Five.{END}", ""),
    "assistant first": (CHATML, [ANSWER, USER, {**ANSWER, "content": "5"}], None, f"Five.{END}5{END}", ""),
    "later system message": (CHATML, [USER, SYSTEM, ANSWER], None, f"Five.{END}", "system\nBe brief."),
}
# name: (template, messages, tools, the place, a word of the message)
REFUSED = {
    "calls left out": (NO_TOOLS, [USER, CALL], None, "messages[1].tool_calls", "find_ship"),
    "arguments left out": (NAME_ONLY, [USER, CALL], None, "messages[1].tool_calls", "leaves out"),
    "tools left out": (NO_TOOLS, [USER, ANSWER], [TOOL], "tools", "find_ship"),
    "thoughts left out": (NO_TOOLS, [USER, THOUGHT], None, "messages[1].thoughts", "Two and three."),
    "thoughts behind an empty one": (EMPTY_THOUGHT, [USER, THOUGHT], None, "messages[1].thoughts", "Two and three."),
    "system left out": (ONLY_TWO, [SYSTEM, USER, ANSWER], None, "messages[0].content", "Be brief."),
    "tool's answer left out": (ONLY_TWO, [USER, {"role": "tool", "content": "7"}, ANSWER], None, "messages[1]", "7"),
}


def load(tmp_path, template, messages, tools):
    tokenizer = make_tokenizer(template)
    row = {"messages": messages} | ({"tools": tools} if tools else {})
    return load_dataset(str(write_rows(tmp_path / "d.jsonl", [row])), tokenizer, DataConfig()), tokenizer


@pytest.mark.parametrize("name", list(WRITTEN))
def test_every_word_is_written(name, tmp_path):
    template, messages, tools, learned, held = WRITTEN[name]
    dataset, tokenizer = load(tmp_path, template, messages, tools)
    example = dataset.examples[0]
    assert tokenizer.decode([label for label in example.labels if label != IGNORE]).lstrip(" ") == learned
    assert held in tokenizer.decode(example.input_ids) and not dataset.notices


@pytest.mark.parametrize("name", [name for name in WRITTEN if "first" not in name])
def test_the_last_answer_stands_behind_the_prompt_that_generation_writes(name, tmp_path):
    template, messages, tools, *_ = WRITTEN[name]
    dataset, tokenizer = load(tmp_path, template, messages, tools)
    prompt, example = prompt_ids(messages[:-1], tokenizer, tools), dataset.examples[0]
    assert example.input_ids[: len(prompt)] == prompt and set(example.labels[: len(prompt)]) == {IGNORE}


@pytest.mark.parametrize("name", list(REFUSED))
def test_a_template_that_leaves_words_out_is_refused(name, tmp_path):
    template, messages, tools, place, word = REFUSED[name]
    with pytest.raises(UserError, match="must write all") as error:
        load(tmp_path, template, messages, tools)
    assert f"d.jsonl:1:{place}" in str(error.value) and word in str(error.value)


def test_what_differs_is_told_with_its_count(tmp_path):
    """A prompt that opens a thought which the row does not hold; thoughts that the template drops from the history."""
    dataset, _ = load(tmp_path, R1, [USER, ANSWER], None)
    assert dataset.notices == [f"{OTHER_PROMPT}: 1 row"]
    dataset, tokenizer = load(tmp_path, HISTORY, [USER, THOUGHT, USER, THOUGHT], None)
    assert dataset.notices == [f"{NO_THOUGHTS}: 1 row"]
    learned = tokenizer.decode([label for label in dataset.examples[0].labels if label != IGNORE])
    assert learned == f"Five.{END}<think>Two and three.</think>Five.{END}"


@pytest.mark.parametrize("thought", [THOUGHT, INLINE])
def test_a_prompt_that_closes_an_empty_thought_is_told(thought, tmp_path):
    """The thoughts do not go behind the empty one."""
    dataset, tokenizer = load(tmp_path, CLOSED, [USER, thought], None)
    learned = tokenizer.decode([label for label in dataset.examples[0].labels if label != IGNORE])
    assert learned == f"Two and three.\n</think>\n\nFive.{END}" and dataset.notices == [f"{OTHER_PROMPT}: 1 row"]
    assert tokenizer.decode(dataset.examples[0].input_ids).count("<think>") == 1


def test_a_call_behind_a_prompt_that_opens_a_thought_is_told(tmp_path):
    dataset, tokenizer = load(tmp_path, NO_CONTENT, [USER, CALL], None)
    learned = tokenizer.decode([label for label in dataset.examples[0].labels if label != IGNORE])
    assert learned == f"find_ship{JSON}{END}" and dataset.notices == [f"{OTHER_PROMPT}: 1 row"]


def test_calls_of_earlier_turns_without_a_generation_prompt(tmp_path):
    """The tools stand elsewhere by then."""
    dataset, tokenizer = load(tmp_path, MISTRAL_CALLS, [USER, CALL, RETURNED, ANSWER, ASKED_MORE, ANSWER], [TOOL])
    learned = tokenizer.decode([label for label in dataset.examples[0].labels if label != IGNORE])
    assert learned == f"[CALLS][{CALLED}]{END}Five.{END}Five.{END}"


def test_earlier_thoughts_are_as_in_the_prompt(tmp_path):
    """Cut from the content they would leave the space behind them, which no chat without them has."""
    messages = [USER, THOUGHT, USER, THOUGHT]
    dataset, tokenizer = load(tmp_path, R1, messages, None)
    prompt = prompt_ids(messages[:-1], tokenizer)
    assert dataset.examples[0].input_ids[: len(prompt)] == prompt and dataset.notices == [f"{NO_THOUGHTS}: 1 row"]


def test_the_check_is_what_refuses(tmp_path, monkeypatch):
    """Without it the call is lost and an empty answer learned."""
    monkeypatch.setattr(module, "check_words", lambda *args: [])
    dataset, tokenizer = load(tmp_path, NO_TOOLS, [USER, CALL], None)
    assert tokenizer.decode([label for label in dataset.examples[0].labels if label != IGNORE]) == END
