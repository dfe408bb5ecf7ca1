"""Calibrated codes of stacked experts: each expert's matrices for the tokens that the router sends to it.

An expert without tokens gets the scales of the least squared error, and the nearest codes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from onecard.config import StoredConfig
from onecard.export.calibrated.calibration import Routed
from onecard.export.calibrated.feedback import (
    PIECE_ROWS,
    Factor,
    choose_codes,
    choose_scales,
    column_weights,
    packed_values,
    spread,
)
from onecard.export.calibrated.layers import Workers
from onecard.quant.blockwise import check_stack, make_state
from onecard.quant.scales import state_absmax
from onecard.quant.state import QuantState


class RoutedExperts:
    """A module with stacked experts in 16 bits, and what it received on the calibration rows."""

    def __init__(self, module: Any, routed: Routed):
        self.module = module
        self.x_TK, self.index_TJ = torch.cat(routed.hidden), torch.cat(routed.index)

    @property
    def idle(self) -> list[int]:
        """Return the experts without tokens."""
        return sorted(set(range(self.module.down_proj.shape[0])) - set(self.index_TJ.unique().tolist()))

    def quantize(
        self, name: str, quant: StoredConfig, dtype: torch.dtype, workers: Workers, where: str
    ) -> tuple[Tensor, QuantState]:
        """Quantize a stacked weight, (E, N, K), or (E, K, N) if the module is transposed. Return codes and state.

        Args:
            name: of the weight in the module; `where`: in an error.
            dtype: the state's.

        Raises:
            UserError: an expert's matrix is not whole blocks.
        """
        stack = self.module.get_parameter(name)
        check_stack(stack.shape, quant.blocksize, where)
        scales = workers.map(partial(self.scales, name, quant, where), range(len(stack)))
        how = (quant.quant_type, quant.blocksize, quant.double_quant)
        state = make_state(torch.cat(scales), stack.shape, dtype, *how)
        packed = workers.map(partial(self.codes, name, quant, state_absmax(state)), range(len(stack)))
        return torch.cat(packed)[:, None], state

    def scales(self, name: str, quant: StoredConfig, where: str, expert: int) -> Tensor:
        """Return the scales of an expert's matrix, float32 (num_blocks,)."""
        W = self.module.get_parameter(name)[expert].float()
        weight_K = column_weights(self.inputs(name, expert).square().sum(0))
        weights = weight_K[:, None] if self.module.is_transposed else weight_K
        return choose_scales(W, weights, quant, f"{where}, expert {expert}")

    def codes(self, name: str, quant: StoredConfig, absmax: Tensor, expert: int) -> Tensor:
        """Return the packed codes of an expert's matrix, uint8 (N K / 2,)."""
        W = self.module.get_parameter(name)[expert].float()
        scale = spread(absmax, quant.blocksize, expert * W.numel(), W.numel()).view_as(W)
        x_MK = self.inputs(name, expert)
        factor = Factor.of(x_MK.T @ x_MK)
        if self.module.is_transposed:
            W, scale = W.T, scale.T
        pieces = zip(W.split(PIECE_ROWS), scale.split(PIECE_ROWS))
        codes_NK = torch.cat([choose_codes(*piece, factor, quant.quant_type) for piece in pieces])
        return packed_values(codes_NK.T if self.module.is_transposed else codes_NK)

    def inputs(self, name: str, expert: int) -> Tensor:
        """Return the inputs of an expert's matrix, float32 (M, K)."""
        x_MK = self.x_TK[(self.index_TJ == expert).any(1)]
        if name != "down_proj":
            return x_MK.float()
        up = "gate_up_proj" if self.module.has_gate else "up_proj"
        W, bias = self.module.get_parameter(up)[expert], getattr(self.module, f"{up}_bias", None)
        u_MN = x_MK @ (W if self.module.is_transposed else W.T)
        u_MN = u_MN if bias is None else u_MN + bias[expert]
        return (self.module._apply_gate(u_MN) if self.module.has_gate else self.module.act_fn(u_MN)).float()
