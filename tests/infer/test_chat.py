"""Behaviour: the chat as one types it in a terminal, and what it keeps of a talk."""

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from onecard.config import SamplingConfig
from onecard.data.chat.mask import prompt_ids
from onecard.hf.load import load_model
from onecard.infer.chat import Talk
from onecard.infer.decoding import CachedContext
from onecard.infer.generate import generate
from tests.conftest import make_checkpoint, make_tokenizer


class Terminal:
    """onecard chat in a pseudo-terminal."""

    def __init__(self, *args):
        self.master, slave = pty.openpty()
        command = [sys.executable, "-m", "onecard.cli", "chat", *map(str, args)]
        env = {**os.environ, "TERM": "xterm", "COLUMNS": "200"}
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=subprocess.DEVNULL, env=env, start_new_session=True,
            preexec_fn=own_terminal,
        )  # fmt: skip
        os.close(slave)

    def type(self, text):
        os.write(self.master, text.encode())

    def insist(self, text, pattern):
        """Type until it is seen: a signal between readline's prompt and its wait for a key is not, without another."""
        shown = ""
        while not re.search(pattern, shown, re.S):
            self.type(text)
            if select.select([self.master], [], [], 2)[0]:
                shown += self.until("you ")

    def until(self, pattern, seconds=60):
        """What the terminal shows until a match of `pattern`, colours left out."""
        end, raw, shown = time.monotonic() + seconds, b"", ""
        while not re.search(pattern, shown, re.S):
            assert time.monotonic() < end and select.select([self.master], [], [], seconds)[0], shown
            try:
                raw += os.read(self.master, 4096)
            except OSError:  # the other end is closed
                raise AssertionError(shown) from None
            shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", raw.decode(errors="replace"))
        return shown


def own_terminal():
    """The pseudo-terminal becomes the one whose Ctrl-C the process gets."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture(scope="module")
def long_checkpoint(tmp_path_factory):
    """Answers that go on for thousands of tokens."""
    folder = tmp_path_factory.mktemp("long")
    return make_checkpoint(folder, max_position_embeddings=8192, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def adapter(long_checkpoint, tmp_path_factory):
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(long_checkpoint)
    tuned = get_peft_model(base, LoraConfig(target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    folder = tmp_path_factory.mktemp("adapter")
    tuned.save_pretrained(folder)
    return folder


def test_a_talk_in_a_terminal(long_checkpoint, adapter, tmp_path):
    options = ("--temperature", 0, "--max-new-tokens", 8000, "--device", "cpu")
    terminal = Terminal("--model", long_checkpoint, "--adapter", adapter, *options)
    try:
        terminal.until("Ctrl-D ends.*you ")
        terminal.type("how many?\r")
        terminal.until("tuned\r\n.{20}")
        terminal.type("\x03")
        shown = terminal.until("stopped.*you ")
        assert int(re.search(r"(\d+) tokens", shown).group(1)) < 8000
        terminal.insist("\x03", "/quit ends the talk.*you ")
        terminal.type("/adapter off\r")
        terminal.until("adapter off.*you ")
        terminal.type("/again\r")
        terminal.until("base\r\n.{20}")
        terminal.type("\x03")
        terminal.until("stopped.*you ")
        terminal.type("\x1b[200~first\nsecond\x1b[201~ third\r")  # a paste, then typing
        terminal.until("base\r\n.{20}")
        terminal.type("\x03")
        terminal.until("stopped.*you ")
        terminal.type("/nonsense\r")
        terminal.until("no command /nonsense.*you ")
        terminal.type(f"/save {tmp_path}/talk.jsonl\r")
        terminal.until("appended.*you ")
        terminal.type("\x1b[A\x1b[A\x01\x0b/system be\x7f\x7fterse\r")  # up, up, to the start, cut, and a correction
        terminal.until("forgotten.*you ")
        terminal.type("\x04")
        assert terminal.process.wait(120) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.master)
    messages = json.loads((tmp_path / "talk.jsonl").read_text())["messages"]
    assert [turn["role"] for turn in messages] == ["user", "assistant"] * 2
    assert messages[0]["content"] == "how many?" and messages[2]["content"] == "first\nsecond third"
    assert messages[1]["content"] and messages[3]["content"]


@pytest.fixture(scope="module")
def small(checkpoint):
    """Context of 256 tokens."""
    return load_model(str(checkpoint), compute_dtype="float32", device="cpu"), AutoTokenizer.from_pretrained(checkpoint)


def make_talk(model, tokenizer, max_new_tokens=16):
    out = io.StringIO()
    return Talk(model, tokenizer, Console(file=out, width=100), max_new_tokens, SamplingConfig()), out


def test_each_answer_is_that_of_the_whole_talk_afresh(small):
    talk, _ = make_talk(*small)
    talk.take("/system be terse")
    for text in ("how many?", "two <|im_end|>", "and the fox?"):
        talk.take(text)
        ids = prompt_ids([*talk.system, *talk.messages[:-1]], small[1])
        assert talk.messages[-1]["content"] == generate(*small, ids, 16)


def test_a_turn_feeds_only_what_is_new(small, monkeypatch):
    """The cache holds the earlier turns: no token is fed twice but those that the template writes otherwise."""
    fed, feed = [], CachedContext.feed
    monkeypatch.setattr(CachedContext, "feed", lambda self, ids: (fed.append(len(ids)), feed(self, ids))[1])
    talk, _ = make_talk(*small, max_new_tokens=4)
    talk.take("how many mugs do you want?")
    before = sum(fed)
    talk.take("fox")
    whole = len(prompt_ids(talk.messages[:-1], small[1]))
    assert sum(fed) - before < whole // 2 + 4


def test_a_talk_that_outgrows_the_context_loses_its_oldest_messages(small):
    talk, out = make_talk(*small, max_new_tokens=24)
    talk.take("/system be terse")
    for i in range(12):
        talk.take(f"{i} the quick brown fox jumps over the lazy dog")
        kept = [*talk.system, *talk.messages[talk.first :]]
        assert kept[1]["role"] == "user" and len(prompt_ids(kept[:-1], small[1])) <= 256 - 24
    assert talk.first > 0 and len(talk.messages) == 24
    assert f"the oldest {talk.first} messages are left out" in out.getvalue()


def test_a_message_that_is_too_long_is_told_and_forgotten(small):
    talk, out = make_talk(*small)
    talk.take("how many?")
    talk.take("the lazy dog " * 200)
    assert len(talk.messages) == 2 and "must leave room" in out.getvalue()
    talk.take("and now?")
    assert len(talk.messages) == 4


def test_what_a_template_refuses_ends_nothing(small):
    refusing = make_tokenizer("{{ raise_exception('no') if messages | length > 1 }}a")
    talk, out = make_talk(small[0], refusing)
    talk.take("/system be terse")
    talk.take("a")
    assert talk.messages == [] and "must accept the messages" in out.getvalue()
    talk.take("/system")
    talk.take("a")
    assert len(talk.messages) == 2


def test_commands_say_what_they_need(small, tmp_path):
    talk, out = make_talk(*small)
    for text, said in (
        ("/again", "needs a message"),
        ("/adapter on", "no adapter"),
        ("/save x", "nothing said yet"),
        ("/help", "/reset"),
    ):
        talk.take(text)
        assert said in out.getvalue()
    talk.take("hi")
    talk.take(f"/save {tmp_path}")
    assert "must be writable" in out.getvalue()


def test_control_characters_of_an_answer_are_not_obeyed(small, monkeypatch):
    def advance(answer):
        answer.finish_reason = "stop"
        return "a\x1b[2Jb\n\tc"

    monkeypatch.setattr("onecard.infer.chat.Answer.advance", advance)
    talk, out = make_talk(*small)
    talk.take("hi")
    assert out.getvalue().startswith("a\\x1b[2Jb\n") and "\x1b" not in out.getvalue()
    assert talk.messages[-1]["content"] == "a\x1b[2Jb\n\tc"
