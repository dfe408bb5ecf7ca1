"""What a second rounding costs: weights that a checkpoint stores in few bits are rounded again, to our 4 bits."""

from __future__ import annotations

from typing import Any

from onecard.hf.checkpoint import Checkpoint
from onecard.hf.stored import read_rows
from onecard.kernels import ops

NUM_WEIGHTS = 8  # of the sample, spread over the model
NUM_ROWS = 64  # of each


def second_rounding(checkpoint: Checkpoint, model: Any, quant: Any) -> str | None:
    """Return a line about it with an error that is measured on some rows of some weights; None if there is none.

    Args:
        model: `read_model` of the checkpoint.
        quant: a QuantConfig.
    """
    names = [model.stored[name] for name in model.linears if name in model.stored]
    forms = {name: form for name in names if (form := checkpoint.tensors[name].form) is not None and form.is_rounded}
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
    return (
        f"the base is stored in {kinds}; training rounds each weight a second time, to {quant.quant_type}, which moves "
        f"it by {share} of its norm (a sample)"
    )
