"""The form of a run's prompts: found in its training rows, and applied to the prompts of inference."""

from __future__ import annotations

import hashlib
from typing import Any

from onecard.adapter.origin import Form
from onecard.data.chat.control import specials_of
from onecard.data.chat.mask import alpaca_prompt, prompt_ids, text_ids
from onecard.data.dataset import Dataset
from onecard.errors import UserError

NAMES = {
    "chat": "the chat template",
    "completion": "plain prompts",
    "alpaca": "alpaca's headings",
    "text": "plain text",
}


def form_of(dataset: Dataset, tokenizer: Any, template: str | None) -> Form:
    """Return the form that most rows have, and the tokens that end their supervised turns.

    A token that also occurs inside a supervised turn is not an end token: it would stop an answer too early.

    Args:
        template: `template_digest` of the tokenizer that inference loads.
    """
    prompt: Any = dataset.stored.prompts.most_common(1)[0][0]
    specials, turns = specials_of(tokenizer).ids, dataset.stored.turns
    ends = (token for token, _ in turns.ends.most_common() if token in specials)
    found = tuple(token for token in ends if token not in turns.inside)
    return Form(prompt=prompt, template=template if prompt == "chat" else None, end_tokens=found)


def template_digest(tokenizer: Any) -> str | None:
    """Return the sha256 of a tokenizer's chat template; None if it has none."""
    if not tokenizer.chat_template:
        return None
    template = tokenizer.chat_template
    text = template if isinstance(template, str) else repr(sorted(template.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def form_ids(
    messages: list[dict[str, Any]], tokenizer: Any, form: Form | None, tools: list[dict[str, Any]] | None = None
) -> list[int]:
    """Return the prompt's tokens for the next message, in the form of the adapter's training rows.

    Args:
        tools: those that the next message may call, of a chat only.

    Raises:
        UserError: more than one message for an adapter that was trained on single prompts; same as `prompt_ids`.
    """
    if form is None or form.prompt == "chat":
        return prompt_ids(messages, tokenizer, tools)
    if len(messages) > 1:
        raise UserError(
            "an adapter that was trained on single prompts takes one user message",
            f"{len(messages)} messages; its rows were {NAMES[form.prompt]}",
            "send the last message alone, or train on rows of messages",
        )
    text = messages[0]["content"]
    return text_ids(alpaca_prompt(text) if form.prompt == "alpaca" else text, tokenizer)


def ask(
    prompt: str, tokenizer: Any, form: Form | None, raw: bool | None, system: str | None = None
) -> tuple[list[int], bool, str | None]:
    """Return a prompt's tokens, whether the answer continues its text, and the line of `difference`.

    Args:
        raw: same as in `difference`.
        system: a system message before the prompt.

    Raises:
        UserError: a system message for a prompt without a chat template; same as `form_ids`.
    """
    asked, note = [{"role": "user", "content": prompt}], difference(form, tokenizer, raw)
    if system is not None:
        if raw or not tokenizer.chat_template:
            found = "--raw" if raw else "a tokenizer without one"
            raise UserError("a system message needs a chat template", found, "leave it out", "system")
        asked.insert(0, {"role": "system", "content": system})
    if raw is None:
        return form_ids(asked, tokenizer, form), form is not None and form.prompt in ("completion", "text"), note
    return text_ids(prompt, tokenizer) if raw else prompt_ids(asked, tokenizer), raw, note


def difference(form: Form | None, tokenizer: Any, raw: bool | None = None) -> str | None:
    """Return one line if the prompt's form differs from the adapter's training rows; None if it does not.

    Args:
        raw: True: the user asks for the prompt without a template; False: for the chat template; None: for neither.
    """
    if form is None:
        return None
    plain = form.prompt in ("completion", "text")
    if raw is True and not plain:
        return f"the prompt goes in as it is, but the adapter's rows were written with {NAMES[form.prompt]}"
    if raw is False and form.prompt != "chat":
        return f"the prompt is written with the chat template, but the adapter's rows were {NAMES[form.prompt]}"
    if form.prompt == "chat" and form.template != template_digest(tokenizer):
        return "the tokenizer's chat template is not the one that the adapter was trained with"
    return None
