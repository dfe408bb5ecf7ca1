"""A Modelfile for Ollama: the chat template in Go's language, and the tokens that end an answer.

Ollama does not run Jinja. What a chat template writes around the messages is found by rendering probes:

    head  (system_head S system_tail)?  { user_head U user_tail  A assistant_tail } ...

where user_tail ends with what asks for an answer. The parts are taken from a chat of two users and one assistant;
they stand for the template only if they also make up longer chats, with and without a system message. Else TEMPLATE
is left out and a note says so.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from onecard.data.template import bos, render
from onecard.errors import UserError

MARKS = ("\u2042s\u2042", "\u2042u\u2042", "\u2042a\u2042")
Message = dict[str, str]


@dataclass(frozen=True)
class Chat:
    """What stands around the messages; system parts are None where the template takes no system message."""

    head: str
    user_head: str
    user_tail: str
    assistant_tail: str
    system: tuple[str, str] | None

    def text(self, messages: list[Message]) -> str:
        """The prompt that asks for the next answer."""
        made, rest = self.head, messages
        if messages[0]["role"] == "system" and self.system:
            made, rest = self.system[0] + messages[0]["content"] + self.system[1], messages[1:]
        for message in rest:
            user = message["role"] == "user"
            around = (self.user_head, self.user_tail) if user else ("", self.assistant_tail)
            made += around[0] + message["content"] + around[1]
        return made

    def go(self) -> str | None:
        """The template in Go's language; None if a part would be read as Go or end the Modelfile's quotes."""
        head = self.head
        if self.system:
            head = f"{{{{ if .System }}}}{self.system[0]}{{{{ .System }}}}{self.system[1]}{{{{ else }}}}{head}{{{{ end }}}}"
        user = f"{self.user_head}{{{{ .Content }}}}{self.user_tail}"
        assistant = f"{{{{ .Content }}}}{self.assistant_tail}"
        parts = (self.head, *(self.system or ()), self.user_head, self.user_tail, self.assistant_tail)
        if any("{{" in part or '"""' in part for part in parts):
            return None
        return (
            f'{head}{{{{ range .Messages }}}}{{{{ if eq .Role "user" }}}}{user}'
            f'{{{{ else if eq .Role "assistant" }}}}{assistant}{{{{ end }}}}{{{{ end }}}}'
        )


def modelfile(start: str, tokenizer: Any, end_ids: list[int]) -> tuple[str, list[str]]:
    """The file's text, and notes.

    Args:
        start: FROM and ADAPTER lines.
        end_ids: every token that ends an answer.
    """
    lines, notes = [start], []
    template = None
    if tokenizer.chat_template:
        chat = find_chat(tokenizer)
        template = chat.go() if chat else None
        if template is None:
            notes.append("the chat template has no simple form in Ollama's language: write TEMPLATE in the Modelfile")
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    lines += [f'PARAMETER stop "{tokenizer.convert_ids_to_tokens(i)}"' for i in end_ids]
    return "\n".join(lines) + "\n", notes


def find_chat(tokenizer: Any) -> Chat | None:
    """What a chat template writes around messages; None if that is not all that it does."""
    S, U, A = MARKS
    talk = [message("user", U), message("assistant", A), message("user", U)]
    try:
        head, tail, between, last = rendered(talk, tokenizer).replace(A, U).split(U)
    except (UserError, ValueError):
        return None
    user_head = os.path.commonprefix([head[::-1], between[::-1]])[::-1]
    assistant_tail = between.removesuffix(user_head)
    head = head.removesuffix(user_head)
    long = [*talk, message("assistant", A), message("user", "x"), message("assistant", "y"), message("user", "z")]
    if tail != last:
        return None
    system = find_system(tokenizer, user_head)
    chat = Chat(head, user_head, tail, assistant_tail, system)
    if system and not makes(chat, [message("system", S), *long], tokenizer):
        chat = Chat(head, user_head, tail, assistant_tail, None)
    return chat if makes(chat, long, tokenizer) and makes(chat, talk[:1], tokenizer) else None


def find_system(tokenizer: Any, user_head: str) -> tuple[str, str] | None:
    """What stands before and after a system message that opens a chat."""
    S, U, _ = MARKS
    try:
        before, after = rendered([message("system", S), message("user", U)], tokenizer).partition(U)[0].split(S)
    except (UserError, ValueError):
        return None
    return (before, after.removesuffix(user_head)) if after.endswith(user_head) else None


def makes(chat: Chat, messages: list[Message], tokenizer: Any) -> bool:
    return chat.text(messages) == rendered(messages, tokenizer)


def rendered(messages: list[Message], tokenizer: Any) -> str:
    """The chat template's prompt, without the BOS where the reader writes one by itself."""
    text = render(messages, tokenizer, "chat template", None, add_generation_prompt=True)
    return text.removeprefix(tokenizer.bos_token) if bos(tokenizer) else text


def message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
