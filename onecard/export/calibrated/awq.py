"""AWQ: weights of large inputs are scaled up before rounding to 4 bits, at no cost later (Lin et al. 2023, 2306.00978).

    W x = (W diag(s)) (x / s)        s = mean|x|^alpha (section 3.2), alpha from a grid

x / s costs nothing where x comes from a norm, from v_proj through attention, or from up_proj through the gate: their
weights are divided by s. A search chooses s, and then each group's clipping range (section 4's code). It takes the one
with the least output error on the calibration inputs, tr(D H D^T) with D = W - W_hat, H = sum of x x^T. This is the
sum of squared errors itself, so that no input is stored. Levels are asymmetric; the file format is "gemm".
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from onecard.config import CalibrationConfig
from onecard.export.calibrated.calibration import Layer
from onecard.export.calibrated.hessian import Inputs
from onecard.export.calibrated.storage import Calibrated
from onecard.export.folder import Shapes
from onecard.quant.grouped import IN_LAYER, Grouped, pack_int32, round_to_nearest

GRID = 20  # steps of alpha from 0 to 1
SHRINKS = [1 - step / 20 for step in range(8)]  # shares of a group's range that its levels may cover
NIBBLES = [0, 2, 4, 6, 1, 3, 5, 7]  # which of 8 outputs each four bits of an int32 hold
ATTENTION = {"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "q_norm", "k_norm"}  # children of a block linear in v
MLP = {"gate_proj", "up_proj", "gate_up_proj", "down_proj", "act_fn", "activation_fn"}  # children of one linear in up
GATES = {"gate_proj", "gate_up_proj"}


@dataclass
class Source:
    """The module that computes a linear's input and can be divided by s: a norm, or the last rows of a linear.

    Attributes:
        size: how many of its outputs form the input.
        repeat: how many heads of the input each head of head_dim outputs forms (grouped keys and values).
    """

    name: str
    size: int
    is_norm: bool = False
    head_dim: int = 1
    repeat: int = 1

    def mean(self, x_K: Tensor) -> Tensor:
        """Return, for each output, the mean of x over the inputs that it forms."""
        return x_K.view(-1, self.repeat, self.head_dim).mean(1).flatten()

    def spread(self, s: Tensor) -> Tensor:
        """Expand s of the outputs to s_K of the inputs that they form."""
        return s.view(-1, 1, self.head_dim).expand(-1, self.repeat, -1).flatten()


class Scaling:
    """All s of one layer.

    Attributes:
        columns, rows: by linear, s of its inputs and the divisor of its outputs, float32.
        changed: the norm weights and biases that were divided, in the checkpoint's dtype.
    """

    def __init__(self, layer: Layer):
        self.layer = layer
        self.columns: dict[str, Tensor] = {}
        self.rows: dict[str, Tensor] = {}
        self.changed: dict[str, Tensor] = {}

    def weight(self, name: str) -> Tensor:
        """Return a linear's float32 weight, multiplied by s of its inputs and divided by s of its outputs."""
        W_NK = self.layer.module.get_parameter(f"{name}.weight").float()
        if name in self.columns:
            W_NK = W_NK * self.columns[name]
        return W_NK / self.rows[name][:, None] if name in self.rows else W_NK

    def scale(self, inputs: Inputs, source: Source, s: Tensor) -> None:
        """Divide the source by s and multiply the linears by it. H becomes that of x / s."""
        s = self.divide_norm(source.name, s) if source.is_norm else self.divide_rows(source, s)
        s_K = source.spread(s)
        self.columns |= dict.fromkeys(inputs.names, s_K)
        inputs.H_KK /= s_K[:, None] * s_K

    def divide_norm(self, name: str, s: Tensor) -> Tensor:
        """Divide a norm's weight by s. Return the actual divisor, which includes the rounding of the stored weight."""
        norm: Any = self.layer.module.get_submodule(name)
        offset = norm_offset(norm)
        gain = norm.weight.float() + offset
        stored = (gain / s - offset).to(self.layer.dtype)
        s = gain / (stored.float() + offset)
        whole = torch.isfinite(s) & (s > 0)
        norm.weight.copy_(torch.where(whole, stored.to(norm.weight.dtype), norm.weight))
        self.changed[f"{name}.weight"] = norm.weight.to(self.layer.dtype)
        return torch.where(whole, s, 1.0)

    def divide_rows(self, source: Source, s: Tensor) -> Tensor:
        linear: Any = self.layer.module.get_submodule(source.name)
        divisor = torch.ones(linear.weight.shape[0], device=s.device)
        divisor[-source.size :] = s
        self.rows[source.name] = divisor
        if linear.bias is not None:
            linear.bias.copy_(linear.bias.float() / divisor)
            self.changed[f"{source.name}.bias"] = linear.bias.to(self.layer.dtype)
        return s


def scale_layer(layer: Layer, names: set[str], group_size: int) -> Scaling:
    """Find every s of a layer. Norms and biases are divided in place; `Scaling.weight` returns the scaled weights."""
    scaling = Scaling(layer)
    for inputs in layer.inputs:
        source = find_source(layer.module, inputs)
        if source is not None and names.issuperset(inputs.names) and (source.is_norm or source.name in names):
            scaling.scale(inputs, source, search(scaling, inputs, source, group_size))
    return scaling


def find_source(layer: nn.Module, inputs: Inputs) -> Source | None:
    """Return the source of an input; None if no source is known in which the input is linear."""
    K = len(inputs.mean_K)
    if inputs.norm:
        return Source(inputs.norm, K, is_norm=True)
    parent, _, last = inputs.names[0].rpartition(".")
    block: Any = layer.get_submodule(parent)
    children = dict(block.named_children())
    if last == "o_proj" and set(children) <= ATTENTION:
        name = "v_proj" if "v_proj" in children else "qkv_proj"
        size = block.config.num_key_value_heads * block.head_dim
        return Source(f"{parent}.{name}", size, False, block.head_dim, K // size)
    if last == "down_proj" and set(children) <= MLP and not set(children).isdisjoint(GATES):
        name = "up_proj" if "up_proj" in children else "gate_up_proj"
        return Source(f"{parent}.{name}", K)
    return None


def norm_offset(norm: nn.Module) -> float:
    """Return 1 for a norm that multiplies by 1 + weight, as in Gemma; else 0."""
    probe: Any = copy.deepcopy(norm)
    probe.weight.zero_()
    return float(probe(torch.ones_like(probe.weight)).abs().max() > 0)


def search(scaling: Scaling, inputs: Inputs, source: Source, group_size: int) -> Tensor:
    """Return the s with the least total error of the linears that share the input, a value per output of the source."""
    weights = [scaling.weight(name) for name in inputs.names]
    mean = source.mean(inputs.mean_K)
    mean = mean.clamp(min=1e-4 * float(mean.max())) if mean.max() > 0 else torch.ones_like(mean)
    best, least = torch.ones_like(mean), float("inf")
    for step in range(GRID + 1):
        s = mean ** (step / GRID)
        s /= (s.max() * s.min()).sqrt()
        s_K, error = source.spread(s), 0.0
        for W_NK in weights:
            D_NK = W_NK - round_to_nearest(W_NK * s_K, group_size, sym=False).dequantize() / s_K
            error += float(((D_NK @ inputs.H_KK) * D_NK).sum())
        if error < least:
            best, least = s, error
    return best


def quantize(W_NK: Tensor, H_KK: Tensor, group_size: int) -> Grouped:
    """Round a float32 weight to the nearest levels. Each group's range is clipped by the share with the least error."""
    N, K = W_NK.shape
    H_Ggg = torch.stack([H_KK[k : k + group_size, k : k + group_size] for k in range(0, K, group_size)])
    shrink = torch.ones(N, K // group_size, device=W_NK.device)
    least = torch.full_like(shrink, float("inf"))
    for share in SHRINKS:
        found = round_to_nearest(W_NK, group_size, False, torch.full_like(shrink, share))
        D_GNg = (W_NK - found.dequantize()).view(N, -1, group_size).transpose(0, 1)
        error = ((D_GNg @ H_Ggg) * D_GNg).sum(-1).T
        shrink[error < least] = share
        least = torch.minimum(least, error)
    return round_to_nearest(W_NK, group_size, False, shrink)


class AWQ(Calibrated):
    """Scales and zeros of groups. Experts have no s: the router and the other experts share their inputs. The range of
    each of their groups is clipped."""

    title = "AWQ"

    def quantize_layer(
        self, layer: Layer, names: set[str], config: CalibrationConfig, dtype: torch.dtype
    ) -> Iterator[tuple[str, Grouped | Tensor]]:
        scaling = scale_layer(layer, names, config.group_size)
        yield from scaling.changed.items()
        for inputs in layer.inputs:
            for name in names.intersection(inputs.names):
                found = quantize(scaling.weight(name), inputs.H_KK, config.group_size)
                layer.module.get_parameter(f"{name}.weight").copy_(found.dequantize())
                yield name, found

    def quantize(self, W_NK: Tensor, H_KK: Tensor, config: CalibrationConfig, dtype: torch.dtype) -> Grouped:
        return quantize(W_NK, H_KK, config.group_size)

    def nearest(self, W_NK: Tensor, config: CalibrationConfig, dtype: torch.dtype, peak: float = 0.0) -> Grouped:
        return round_to_nearest(W_NK, config.group_size, sym=False)

    def tensors(self, weight: Grouped) -> dict[str, Tensor]:
        N, K = weight.codes_NK.shape
        return {
            "qweight": pack_int32(weight.codes_NK.T.reshape(K, N // 8, 8)[..., NIBBLES]),
            "qzeros": pack_int32(weight.zeros_NG.T.reshape(-1, N // 8, 8)[..., NIBBLES]),
            "scales": weight.scales_NG.T,
        }

    def shapes(self, N: int, K: int, config: CalibrationConfig, dtype: str) -> Shapes:
        groups = K // config.group_size
        return {
            "qweight": ("I32", (K, N // 8)),
            "qzeros": ("I32", (groups, N // 8)),
            "scales": (dtype, (groups, N)),
        }

    def config_fields(self, config: CalibrationConfig, linears: list[str], left_out: list[str]) -> dict[str, Any]:
        left_out = [name for name in left_out if IN_LAYER.search(name)]
        found = {
            "quant_method": "awq",
            "bits": 4,
            "group_size": config.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": left_out or None,
        }
        return {"quantization_config": found}
