"""Behaviour: the chat templates of public models, as trl holds them, over chats of many kinds: each right or refused.

Right: each answer's words are learned and none of another's; the last turn stands behind the prompt that generation
writes, or the difference is told. What is refused is refused by the row and the words, not by a template's own error.
"""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from onecard.data.chat.mask import IGNORE, NO_THOUGHTS, OTHER_PROMPT, encode, prompt_ids
from onecard.data.records import Record
from onecard.errors import UserError
from tests.conftest import make_tokenizer

TRL = find_spec("trl")
FILES = sorted(Path(TRL.origin).parent.glob("chat_templates/*.jinja")) if TRL and TRL.origin else []
# Most differ little from these; the slow mark takes all.
USUAL = """cohere2 deepseek_r1_distill deepseekv3 gemma3 gemma4_v5 glm4moe gptoss idefics3 lfm2_2_5_v2 llama3_1
nemotron_3_nano phi3_5 phi3_training qwen2_5 qwen3 qwen3_5_nothink qwen3_8 qwen3_8_training""".split()
SPECIALS = re.compile(r"<[|｜][^<>{}'\"\s]{1,40}[|｜]?>|<[a-z_]+\|>|<(?:start|end)_of_turn>|<end_of_utterance>|</s>")
ENDS = ("<|eot_id|>", "<end_of_turn>", "<turn|>", "<|return|>", "<|END_OF_TURN_TOKEN|>")

USER, ANSWER = {"role": "user", "content": "Asked?"}, {"role": "assistant", "content": "Five."}
MORE = [{"role": "user", "content": "And that?"}, {"role": "assistant", "content": "Six."}]
SYSTEM, RETURNED = {"role": "system", "content": "Be brief."}, {"role": "tool", "content": "Gorch", "name": "find_ship"}
FUNCTION = {"name": "find_ship", "arguments": {"port": "Kiel", "deep": {"all": [1, "é"]}}}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "id": "c00000001", "function": FUNCTION}],
}
TOOL = {"type": "function", "function": {"name": "find_ship", "description": "Finds", "parameters": {"type": "object"}}}
THOUGHT = {**ANSWER, "reasoning_content": "Two and three."}
INLINE = {"role": "assistant", "content": "<think>\nTwo and three.\n</think>\n\nFive."}
CHATS = {
    "plain": ([USER, ANSWER], None),
    "system": ([SYSTEM, USER, ANSWER, *MORE], None),
    "developer": ([{**SYSTEM, "role": "developer"}, USER, ANSWER], None),
    "call": ([USER, CALL], [TOOL]),
    "calls": ([SYSTEM, USER, CALL, RETURNED, ANSWER], [TOOL]),
    "call with a content": ([USER, {**CALL, "content": "I look."}], [TOOL]),
    "thoughts": ([USER, THOUGHT], None),
    "thoughts in the content": ([USER, INLINE], None),
    "thoughts of two turns": ([USER, THOUGHT, *MORE[:1], {**THOUGHT, "content": "Six."}], None),
    "thoughts and calls": ([USER, {**CALL, "reasoning_content": "Where?"}, RETURNED, THOUGHT], [TOOL]),
}
REFUSALS = re.compile("must write all|alternate|System role not supported|Only user and assistant roles")


def tokenizer_of(file):
    template = file.read_text(encoding="utf-8")
    specials = tuple(sorted(set(SPECIALS.findall(template)) - {"<|im_start|>", "<|im_end|>"}))
    eos = next((end for end in ENDS if end in template and "eos_token" not in template), "<|im_end|>")
    return make_tokenizer(template, specials, eos_token=eos)


def learned(example, tokenizer):
    return tokenizer.decode([label for label in example.labels if label != IGNORE])


@pytest.mark.parametrize("chat", list(CHATS))
@pytest.mark.parametrize(
    "file", [pytest.param(each, id=each.stem, marks=() if each.stem in USUAL else pytest.mark.slow) for each in FILES]
)
def test_a_public_template_is_right_or_refused(file, chat):
    messages, tools = CHATS[chat]
    tokenizer = tokenizer_of(file)
    try:
        example = encode(Record("f", 1, messages=tuple(messages), tools=tools), tokenizer, 8192)
    except UserError as error:
        assert (error.where or "").startswith("f:1:messages") and REFUSALS.search(str(error)), error
        assert chat != "plain"
        return
    said, text = learned(example, tokenizer), tokenizer.decode(example.input_ids)
    for i, turn in enumerate(messages):
        words = [turn["content"].rpartition("</think>")[2].strip()] + ["Kiel", "find_ship"] * ("tool_calls" in turn)
        words += ["Two and three."] * (chat.startswith("thoughts") and i == len(messages) - 1)
        for word in words:
            assert word in text and (word in said) == (turn["role"] == "assistant" or not word)
    assert not re.search(r"<think>\s*</think>\s*<think>", text)
    prompt = prompt_ids(messages[:-1], tokenizer, tools)
    behind = example.input_ids[: len(prompt)] == prompt
    assert behind or OTHER_PROMPT in example.notes
    assert NO_THOUGHTS not in example.notes or chat in ("thoughts of two turns", "thoughts and calls")


@pytest.mark.skipif(not FILES, reason="needs trl's templates")
def test_an_answer_begins_behind_what_asks_for_it():
    """gpt-oss drops the thoughts before a call once an answer follows: the row does not hold the last prompt."""
    tokenizer = tokenizer_of(next(file for file in FILES if file.stem == "gptoss"))
    messages, tools = CHATS["thoughts and calls"]
    example = encode(Record("f", 1, messages=tuple(messages), tools=tools), tokenizer, 8192)
    turns = learned(example, tokenizer).split("<|call|>")
    assert OTHER_PROMPT in example.notes and turns[0].startswith(" to=functions.find_ship<|channel|>")
    assert turns[1].startswith("<|channel|>analysis<|message|>Two and three.<|end|>")
