"""Weights that a checkpoint stores in few bits: they stay as they are, or are rounded again, to our 4 bits."""

from __future__ import annotations

from typing import Any

from onecard.hf.checkpoint import Checkpoint
from onecard.hf.experts import expert_places
from onecard.hf.stored import Form, read_rows
from onecard.kernels import ops

NUM_WEIGHTS = 8  # of the sample, spread over the model
NUM_ROWS = 64  # of each


def lines_of_few_bits(checkpoint: Checkpoint, model: Any, quant: Any) -> list[str]:
    """Return a line about the linears that stay as they are stored, if there are any, and `second_rounding`'s."""
    kept = [checkpoint.tensors[model.stored[name]].form for name in model.kept]
    kinds = ", ".join(sorted({form.kind for form in kept if form is not None}))
    line = f"{len(kept)} of {len(model.linears)} linears stay in {kinds}, as the base stores them: no second rounding"
    rounded = second_rounding(checkpoint, model, quant)
    return [line] * bool(kept) + ([rounded] if rounded else [])


def second_rounding(checkpoint: Checkpoint, model: Any, quant: Any) -> str | None:
    """Return a line about it with an error that is measured on some rows of some weights; None if there is none.

    Args:
        model: `read_model` of the checkpoint.
        quant: a QuantConfig.
    """
    names = [model.stored[name] for name in model.linears if name in model.stored and name not in model.kept]
    names += expert_places(model.modules, model.stacks, checkpoint.tensors) if model.stacks else []
    forms: dict[str, Form] = {
        name: form for name in names if (form := checkpoint.tensors[name].form) is not None and form.is_rounded
    }
    if not forms:
        return None
    error = whole = 0.0
    for name in list(forms)[:: -(-len(forms) // NUM_WEIGHTS)]:
        W = read_rows(checkpoint.tensors[name], 0, NUM_ROWS)
        found = ops.dequantize_4bit(*ops.quantize_4bit(W, quant.quant_type, quant.blocksize, quant.double_quant, name))
        error += (found.double() - W.double()).square().sum().item()
        whole += W.double().square().sum().item()
    kinds = ", ".join(sorted({form.kind for form in forms.values()}))
    share = f"{(error / whole) ** 0.5:.1%}" if whole else "nothing"
    why = "; ".join(sorted({form.obstacle for form in forms.values() if form.obstacle}))
    return (
        f"{len(forms)} weights of the base are stored in {kinds}; training rounds them a second time, to "
        f"{quant.quant_type}, which moves each by {share} of its norm (a sample){why and f': {why}'}"
    )
