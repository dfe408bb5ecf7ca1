"""Exact: calls of tools are found in an answer's text, however it is cut; what is no call stays text."""

import json
import random

import pytest

from onecard.infer.tools import ToolText, format_of
from tests.conftest import make_tokenizer

HERMES = """{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}For each call return <tool_call>{"name": <name>, "arguments": <args>}</tool_call><|im_end|>
{% endif %}"""
LLAMA = """{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}Respond in the format {"name": function name, "parameters": dictionary of arguments}.<|im_end|>
{% endif %}"""
OTHER = "{%- if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
XML = HERMES.replace('{"name": <name>, "arguments": <args>}', "<function=name></function>")
CHAT = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
CALL = '{"name": "add", "arguments": {"a": [1, "é </tool"], "b": {}}}'
CASES = [
    ("hermes", f"<tool_call>\n{CALL}\n</tool_call>", "", 1),
    ("hermes", f"I add. <tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>", "I add. ", 2),
    ("hermes", f"<tool_call>{CALL}", "", 1),  # the end token came in place of the end mark
    ("hermes", "a < b, <tool> and <tool_cal", "a < b, <tool> and <tool_cal", 0),
    ("hermes", "<tool_call>{broken}</tool_call> after", "<tool_call>{broken}</tool_call> after", 0),
    ("hermes", '<tool_call>{"name": "rm", "arguments": {}}</tool_call>', None, 0),  # no tool of the request
    ("hermes", '<tool_call>{"name": "add", "arguments": "a"}</tool_call>', None, 0),
    ("hermes", '<tool_call>{"name": ["add"], "arguments": {}}</tool_call>', None, 0),
    ("llama", CALL.replace("arguments", "parameters"), "", 1),
    ("llama", "\n " + CALL.replace("arguments", "parameters"), "", 1),
    ("llama", '{"name": "add"', None, 0),
    ("llama", "The sum {3} is 3.", None, 0),
    ("text", f"<tool_call>{CALL}</tool_call>", None, 0),
]


@pytest.mark.parametrize("kind, text, said, num_calls", CASES)
def test_calls_are_found_however_the_text_is_cut(kind, text, said, num_calls):
    rng = random.Random(0)
    for _ in range(20):
        found, shown, rest = ToolText(kind, {"add"}), "", text
        while rest:
            size = rng.randint(1, 9)
            shown, rest = shown + found.push(rest[:size]), rest[size:]
            assert "{" not in shown or num_calls == 0
        more, calls = found.finish()
        assert shown + more == (text if said is None else said) and len(calls) == num_calls
        for call in calls:
            assert call["type"] == "function" and call["function"]["name"] == "add"
            assert json.loads(call["function"]["arguments"]) == {"a": [1, "é </tool"], "b": {}}
        assert len({call["id"] for call in calls}) == num_calls


def test_plain_text_is_shown_at_once():
    for kind in ("hermes", "llama", "text"):
        found = ToolText(kind, {"add"})
        assert found.push("Hello ") == "Hello " and found.push("there <") + found.push("b>") == "there <b>"


@pytest.mark.parametrize(
    "head, kind", [(HERMES, "hermes"), (LLAMA, "llama"), (OTHER, "text"), (XML, "text"), ("", None)]
)
def test_the_format_is_that_of_the_template(head, kind):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = head + CHAT
    assert format_of(tokenizer) == kind
    tokenizer.chat_template = None
    assert format_of(tokenizer) is None
