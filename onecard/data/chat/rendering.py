"""Render chat templates in a separate process with limits (`sandbox.py`)."""

from __future__ import annotations

import atexit
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from onecard.data.files import FIX, shown
from onecard.data.shapes import USUAL, Shape
from onecard.errors import UserError

MAX_SECONDS = 10  # of CPU time, for one chat
MAX_BYTES = 512 << 20


class Sandbox:
    """The process for templates. It starts at the first request, and again after a stop."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None

    def ask(self, request: dict[str, Any]) -> list[dict[str, str]]:
        """Return the reply of sandbox.answers(), or "stopped" for each chat if the process ended before its reply."""
        line = json.dumps(request, default=str)
        with self.lock:
            self.start()
            process = self.process
            assert process is not None and process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(line + "\n")
                process.stdin.flush()
                reply = process.stdout.readline()
            except BaseException as error:  # also Ctrl-C: an unread reply must not answer the next request
                self.stop()
                if not isinstance(error, BrokenPipeError):
                    raise
                reply = ""
            if reply:
                return json.loads(reply)
            return [{"stopped": how_it_ended(self.stop())}] * len(request["each"])

    def start(self) -> None:
        """Start the process if it does not run. It answers after about a second, so callers may start it early.

        -P: Python does not search the file's folder for imports. A new session: Ctrl-C does not reach the process.
        """
        if self.process is not None and self.process.poll() is None:
            return
        command = [sys.executable, "-P", str(Path(__file__).with_name("sandbox.py")), str(MAX_SECONDS), str(MAX_BYTES)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, start_new_session=True
        )

    def renew(self) -> None:
        """Forget the process, which belongs to the process that this one was forked from, and close the copies of its
        pipes."""
        inherited, self.lock, self.process = self.process, threading.Lock(), None
        for stream in (inherited.stdin, inherited.stdout) if inherited is not None else ():
            assert stream is not None
            stream.close()

    def stop(self) -> int:
        """End the process and return its exit status."""
        process, self.process = self.process, None
        if process is None:
            return 0
        process.kill()
        process.communicate()  # closes the pipes and waits
        return process.returncode


def how_it_ended(status: int) -> str:
    if status == -signal.SIGXCPU:
        return f"it runs for more than {MAX_SECONDS} s"
    return f"its process ended with status {status}"


sandbox = Sandbox()
atexit.register(sandbox.stop)


class Renderings:
    """Renderings of a chat and of its first messages by the tokenizer's chat template, from one request.

    Same as the tokenizer's apply_chat_template, which would compile the template in this process.

    Args:
        wanted: (number of messages, whether with generation prompt) of each; the whole chat without it is always made.
        chat_template: used instead of the tokenizer's own.
        shape: the form in which the template receives the messages.

    Raises:
        UserError: no template, or one that exceeds the limits of time, memory or output.
    """

    def __init__(
        self,
        messages: list[dict[str, Any]],
        tokenizer: Any,
        where: str,
        tools: list[dict[str, Any]] | None = None,
        wanted: Iterable[tuple[int, bool]] = (),
        chat_template: str | None = None,
        shape: Shape = USUAL,
    ):
        if not tokenizer.chat_template:
            raise UserError(
                "chats need a tokenizer with a chat template",
                "none",
                "use the instruct version of the model, or rows of prompt/completion",
                where,
            )
        self.tokenizer, self.where, self.tools, self.shape = tokenizer, where, tools, shape
        self.template = f"the chat template of {tokenizer.name_or_path or 'the tokenizer'}"
        turns = [
            {key: value for key, value in turn.items() if value is not None or key == "content"}
            for turn in shape.messages(messages)
        ]
        tools = shape.tools(tools)
        keys = list(dict.fromkeys([(len(messages), False), *wanted]))
        each = [{"conversations": [turns[:count]], "add_generation_prompt": prompted} for count, prompted in keys]
        try:
            source = tokenizer.get_chat_template(chat_template, tools)
            shared = {"chat_template": source, "tools": tools, **tokenizer.special_tokens_map}
            replies = sandbox.ask({"all": shared, "each": each})
        except (RecursionError, ValueError) as error:  # arguments nested too deep; several templates and no default
            replies = [{"refused": str(error)}] * len(keys)
        self.replies = dict(zip(keys, replies))
        stopped = next((reply["stopped"] for reply in replies if "stopped" in reply), None)
        if stopped is not None:
            must = "a chat template must render a chat in bounds"
            raise UserError(must, stopped, "use a template that you trust", self.template)

    def text(self, count: int, prompted: bool = False) -> str:
        """Return the text of the first `count` messages. Raises a UserError of the row if the template refuses them."""
        reply = self.replies[count, prompted]
        if "refused" in reply:
            must = f"{self.template} must accept the messages"
            raise UserError(must, shown(reply["refused"]), FIX, f"{self.where}:messages")
        return reply["text"]

    def prompt(self, count: int) -> str | None:
        """Return the prompt for the message after the first `count`; None if the template refuses those messages."""
        return None if "refused" in self.replies[count, True] else self.text(count, prompted=True)

    def again(
        self, messages: list[dict[str, Any]], wanted: Iterable[tuple[int, bool]] = (), template: str | None = None
    ) -> Renderings:
        """Render other messages, or with another template, with the same settings."""
        return Renderings(messages, self.tokenizer, self.where, self.tools, wanted, template, self.shape)
