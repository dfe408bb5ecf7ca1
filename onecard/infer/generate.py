"""Text from a model: greedy or sampled, with a KV cache, streamed if asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from onecard.errors import UserError
from onecard.hf.checkpoint import read_header, read_json
from onecard.hf.load import first_line
from onecard.hf.quantizer import check_finite


def generate(
    model: Any,
    tokenizer: Any,
    input_ids: list[int],
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """The continuation of `input_ids`, special tokens left out.

    Args:
        max_new_tokens: the most tokens to write; an end token of the tokenizer or of the model stops earlier.
        temperature: 0 takes the likeliest token.
        on_text: called with each finished piece of text as it comes.
    """
    if max_new_tokens < 1 or not temperature >= 0:
        found = f"max_new_tokens {max_new_tokens}, temperature {temperature}"
        raise UserError("max_new_tokens must be 1 or more and temperature 0 or more", found, "correct it")
    ids = torch.tensor([input_ids], device=model.get_input_embeddings().weight.device)
    streamer = Streamer(tokenizer, on_text) if on_text else None
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    if not temperature:
        sampling |= {"temperature": None, "top_p": None, "top_k": None}
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        eos_token_id=end_tokens(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        streamer=streamer,
        **sampling,
    )
    return tokenizer.decode(out[0, len(input_ids) :], skip_special_tokens=True)


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends an answer: the tokenizer's and the generation config's."""
    configured = model.generation_config.eos_token_id
    found = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in [*found, tokenizer.eos_token_id] if token is not None})


class Streamer:
    """transformers' streamer interface: hands on whole words as they are finished."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]):
        self.tokenizer, self.on_text = tokenizer, on_text
        self.tokens: list[int] = []
        self.shown, self.prompt_seen = 0, False

    def put(self, value: torch.Tensor) -> None:
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.tokens += value.view(-1).tolist()
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # a character whose bytes are not all there yet
            self.on_text(text[self.shown :])
            self.shown = len(text)

    def end(self) -> None:
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        self.on_text(text[self.shown :])


def with_adapter(model: Any, adapter: str | None) -> Any:
    """The model with a peft adapter folder on it.

    Raises:
        UserError: a file is missing or damaged, a tensor is missing, unknown, of another shape or not finite.
    """
    if adapter is None:
        return model
    from peft import PeftModel, get_peft_model_state_dict

    weights = Path(adapter) / "adapter_model.safetensors"
    if not weights.is_file():
        raise UserError(
            "an adapter folder must hold adapter_model.safetensors",
            "no such file",
            "pass the run's adapter/ folder",
            adapter,
        )
    config = read_adapter_config(Path(adapter))
    stored = set(read_header(weights))
    do = "use the base model that the adapter was trained on"
    try:
        tuned = PeftModel.from_pretrained(model, adapter, config=config)
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError("the adapter must fit the model", first_line(error), do, str(weights)) from None
    wrong = sorted(stored ^ set(get_peft_model_state_dict(tuned)))
    if wrong:
        found = f"{len(wrong)} differ, first {wrong[0]}"
        raise UserError("the adapter's tensors must be the model's", found, do, str(weights))
    for name, tensor in get_peft_model_state_dict(tuned).items():
        check_finite(f"{weights}: {name}", tensor)
    return tuned.eval()


def read_adapter_config(folder: Path) -> Any:
    """peft's config of an adapter folder. Raises UserError for what is none."""
    from peft import PeftConfig

    from onecard.nn.lora import register_fused

    path = folder / "adapter_config.json"
    read_json(path, "pass the run's adapter/ folder")
    try:
        return register_fused(PeftConfig.from_pretrained(str(folder)))
    except (TypeError, ValueError, KeyError) as error:
        found = f"{type(error).__name__}: {first_line(error)}"
        raise UserError("the file must be an adapter's config of peft", found, "save it again", str(path)) from None
