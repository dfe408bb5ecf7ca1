"""A Modelfile for Ollama: the chat template in Go's language, and the tokens that end an answer.

Ollama does not run Jinja. Rendered probes show the text that a chat template writes around the messages:

    head | system_head S system_tail   then   user_head U user_tail   A assistant_tail   ...

where user_tail ends with the text that requests an answer. The parts come from a chat of two user messages and one
assistant message. They are used only if they also reproduce longer chats, with and without a system message. Otherwise
TEMPLATE is left out and a note says so.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from onecard.adapter.form import NAMES
from onecard.adapter.origin import Form
from onecard.data.chat.mask import alpaca_prompt, bos
from onecard.data.chat.rendering import Renderings
from onecard.errors import UserError

SYSTEM, USER, ASSISTANT = ("\u2042s\u2042", "\u2042u\u2042", "\u2042a\u2042")  # placeholders of messages
Message = dict[str, str]


@dataclass(frozen=True)
class Chat:
    """The text around the messages; `system` is None if the template accepts no system message at the start."""

    head: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant_tail: str

    def text(self, messages: list[Message]) -> str:
        """Return the prompt for the next answer."""
        made, rest = self.head, messages
        if self.system and messages[0]["role"] == "system":
            made, rest = messages[0]["content"].join(self.system), messages[1:]
        for turn in rest:
            made += turn["content"].join(self.user if turn["role"] == "user" else ("", self.assistant_tail))
        return made

    def go(self) -> str | None:
        """Return the template in Go's language; None if a part contains Go's or the Modelfile's delimiters."""
        parts = (self.head, *(self.system or ()), *self.user, self.assistant_tail)
        if any("{{" in part or '"""' in part for part in parts):
            return None
        head, content = self.head, "{{ .Content }}"
        if self.system:
            head = "{{ if .System }}" + "{{ .System }}".join(self.system) + "{{ else }}" + head + "{{ end }}"
        user, assistant = content.join(self.user), content + self.assistant_tail
        return (
            head
            + '{{ range .Messages }}{{ if eq .Role "user" }}'
            + user
            + '{{ else if eq .Role "assistant" }}'
            + assistant
            + "{{ end }}{{ end }}"
        )


def modelfile(start: str, tokenizer: Any, end_ids: list[int], form: Form | None = None) -> tuple[str, list[str]]:
    """Return the file's text, and notes.

    Args:
        start: FROM and ADAPTER lines.
        end_ids: every token that ends an answer.
        form: the form of the adapter's prompts, if its folder records it.
    """
    lines, notes = [start], []
    if form is not None and form.prompt != "chat":
        lines.append(f'TEMPLATE """{plain_template(form)}"""')
        notes.append(f"the Modelfile's TEMPLATE writes {NAMES[form.prompt]}, as the adapter's rows had them")
    elif tokenizer.chat_template:
        chat = find_chat(tokenizer)
        template = chat.go() if chat else None
        if template is None:
            notes.append("the chat template has no simple form in Ollama's language: write TEMPLATE in the Modelfile")
        else:
            lines.append(f'TEMPLATE """{template}"""')
        if chat and chat.system is None:
            notes.append("the Modelfile's TEMPLATE leaves out system messages: the chat template has none at the start")
        if template is not None and "tools" in str(tokenizer.chat_template):
            notes.append("the Modelfile's TEMPLATE leaves out tools, which the chat template has: Ollama takes none")
    lines += [f'PARAMETER stop "{tokenizer.convert_ids_to_tokens(i)}"' for i in end_ids]
    return "\n".join(lines) + "\n", notes


def plain_template(form: Form) -> str:
    """Return the template of a prompt without a chat template, in Go's language."""
    prompt = "{{ .Prompt }}"
    return alpaca_prompt(prompt) if form.prompt == "alpaca" else prompt


def find_chat(tokenizer: Any) -> Chat | None:
    """Return the text that a chat template writes around messages; None if the template does more than that."""
    long = chat_of(USER, ASSISTANT, "x", "y", "z")
    for system in (find_system(tokenizer), ()):
        probes = [long[:1], long[:3], long]
        if system:
            probes.append([{"role": "system", "content": SYSTEM}, *long])
        try:
            chat = parts_of(tokenizer, system)
            if all(chat.text(probe) == rendered(probe, tokenizer) for probe in probes):
                return chat
        except (UserError, ValueError):  # the template rejects such a chat or changes its messages
            continue
    return None


def parts_of(tokenizer: Any, system: tuple[str, ...]) -> Chat:
    """Return the parts from a chat of three messages. Raises ValueError if the template changes the messages."""
    talk = rendered(chat_of(USER, ASSISTANT, USER), tokenizer)
    head, user_tail, between, _ = talk.replace(ASSISTANT, USER).split(USER)
    user_head = common_end([head, between, *system[1:]])
    head, assistant_tail = head.removesuffix(user_head), between.removesuffix(user_head)
    around = (system[0], system[1].removesuffix(user_head)) if system else None
    return Chat(head, around, (user_head, user_tail), assistant_tail)


def find_system(tokenizer: Any) -> tuple[str, ...]:
    """Return the text before a system message, and between it and the first user's; () if the template accepts none."""
    try:
        probe = [{"role": "system", "content": SYSTEM}, *chat_of(USER)]
        before, between = rendered(probe, tokenizer).partition(USER)[0].split(SYSTEM)
    except (UserError, ValueError):
        return ()
    return before, between


def chat_of(*contents: str) -> list[Message]:
    """Return messages that alternate between user and assistant."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def common_end(texts: list[str]) -> str:
    """Return the texts' longest common end, from its first bracket on, so that it does not start inside a token."""
    longest = min(texts, key=len)
    starts = (longest[i:] for i in range(len(longest) + 1))
    end = next(end for end in starts if all(text.endswith(end) for text in texts))
    bracket = re.search(r"[<\[]", end)
    return end[bracket.start() :] if bracket else end


def rendered(messages: list[Message], tokenizer: Any) -> str:
    """Return the chat template's prompt, without the BOS if the tokenizer writes one itself."""
    asked = (len(messages), True)
    text = Renderings(messages, tokenizer, "chat template", wanted=[asked]).text(*asked)
    return text.removeprefix(tokenizer.bos_token) if bos(tokenizer) else text
