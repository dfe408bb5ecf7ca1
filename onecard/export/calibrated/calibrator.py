"""The pass that calibrates a 4-bit base, with one layer in memory.

Each decoder layer is read in 16 bits and run on calibration rows, whose hidden states are the calibrated layers' so
far. feedback.py chooses its codes and scales for these inputs, and its file gets them. The same pass runs the measured
rows through each form of the base.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

import torch
from torch import Tensor

from onecard.adapter.layers import adapted_linears, all_linear, is_target
from onecard.adapter.start import Start
from onecard.config import LoraSettings, QuantConfig
from onecard.export.calibrated.bill import CALIBRATED, NEAREST, SIXTEEN, STARTED, Losses
from onecard.export.calibrated.calibration import Layer, calibrate
from onecard.export.calibrated.experts import RoutedExperts
from onecard.export.calibrated.feedback import Factor, quantize, quantize_with_start
from onecard.export.calibrated.hessian import Inputs
from onecard.export.calibrated.layers import LayeredModel, Row
from onecard.export.calibrated.rows import Rows
from onecard.export.merge.merged import Merged
from onecard.export.merge.quantized import Writer4bit
from onecard.kernels import ops
from onecard.quant.state import QuantState


class Calibrator:
    """One pass through the layers: quantizes their weights, and measures what that costs."""

    def __init__(self, merged: Merged, quant: QuantConfig, lora: LoraSettings | None, device: torch.device):
        self.merged, self.quant = merged, quant
        self.layered = LayeredModel(merged, device)
        self.workers = self.layered.workers
        self.targets = {} if lora is None else start_targets(merged, lora)
        self.rank = max(self.targets.values(), default=0)
        self.forms = (SIXTEEN, NEAREST, CALIBRATED, STARTED) if self.rank else (SIXTEEN, NEAREST, CALIBRATED)
        self.start: Start = {}
        self.idle: list[str] = []  # experts without tokens
        inside = tuple(f"{name}." for name in self.layered.layers)
        decoder = f"{self.layered.name_of(self.layered.decoder)}."
        self.beside = [n for n in merged.model.linears if n.startswith(decoder) and not n.startswith(inside)]

    def run(self, rows: Rows, writer: Writer4bit, on_layer: Callable[[int, int], None]) -> dict[str, Losses]:
        """Write each calibrated weight. Return the losses by form of the base."""
        measured, layered = [*rows.data, *rows.general], self.layered
        first = layered.first_rows([*rows.calibration, *measured], self.round_beside)
        calibration, others = first[: len(rows.calibration)], first[len(rows.calibration) :]
        streams = {form: [row.copy() for row in others] for form in self.forms}
        if self.beside:
            streams[SIXTEEN] = layered.first_rows(measured)
        for layer in calibrate(layered, calibration):
            self.quantize(layer, streams, writer)
            on_layer(layer.index + 1, len(layered.layers))
        return self.losses(streams, rows)

    def round_beside(self) -> None:
        """Round the linears beside the layers, which the file has in 4 bits, to the nearest codes."""
        for name in self.beside:
            self.put(name, self.nearest(name))

    def quantize(self, layer: Layer, streams: dict[str, list[Row]], writer: Writer4bit) -> None:
        """Write a layer's calibrated weights, and advance the measured rows. The layer keeps the weights that training
        begins with."""
        layer.advance(streams[SIXTEEN])
        found = {**self.linears(layer), **self.experts(layer)}
        names = [name for name in self.merged.model.quantized if name.startswith(f"{layer.name}.")]
        self.workers.map(lambda name: self.put(name, self.nearest(name)), names)
        layer.advance(streams[NEAREST])
        for name, (packed, state) in found.items():
            writer.add(self.stored(name), packed.cpu(), state.to("cpu"))
            self.put(name, ops.dequantize_4bit(packed, state))
        layer.advance(streams[CALIBRATED])
        if self.rank:
            for name, (packed, state) in found.items():
                if name in self.start:
                    A_RK, B_NR = self.start[name]
                    self.put(name, torch.addmm(ops.dequantize_4bit(packed, state).float(), B_NR, A_RK))
            layer.advance(streams[STARTED])

    def linears(self, layer: Layer) -> dict[str, tuple[Tensor, QuantState]]:
        """Return the calibrated linears' codes and states by weight. Frees their H. The widest input is factored beside
        the first codes, which do not need it."""
        called: list[tuple[Inputs, list[str]]] = []
        for one in layer.inputs:
            weights = [f"{layer.name}.{name}.weight" for name in one.names]
            weights = [name for name in weights if self.merged.model.stored.get(name) in self.merged.linears]
            called += [(one, weights)] if weights else []
        layer.inputs.clear()
        called.sort(key=lambda item: len(item[0].H_KK))
        factors: dict[str, Future[Factor]] = {}
        with self.workers.pool() as pool:
            while called:
                one, weights = called.pop()
                factors |= dict.fromkeys(weights, pool.submit(Factor.of, one.H_KK))
            size = {name: self.merged.model.quantized[name].weight.numel() for name in reversed(factors)}
            largest_first = sorted(size, key=lambda name: -size[name])
            results = pool.map(lambda name: self.quantized(name, factors[name].result()), largest_first)
            return dict(zip(largest_first, results))

    def quantized(self, name: str, factor: Factor) -> tuple[Tensor, QuantState]:
        """Quantize a linear's weight for its inputs. Keep its start if it has one."""
        W_NK = self.matrix(name)
        if name not in self.targets:
            return quantize(W_NK, factor, self.quant, name)
        packed, state, *pair = quantize_with_start(W_NK, factor, self.quant, name, self.targets[name])
        self.start[name] = (pair[0], pair[1])
        return packed, state

    def experts(self, layer: Layer) -> dict[str, tuple[Tensor, QuantState]]:
        """Return the calibrated stacks' codes and states by weight."""
        found = {}
        for path, routed in layer.routed.items():
            experts = RoutedExperts(layer.module.get_submodule(path), routed)
            names = [name for name in self.merged.experts.stacks if name.startswith(f"{layer.name}.{path}.")]
            for name in names:
                where = (self.quant, layer.dtype, self.workers, name)
                found[name] = experts.quantize(name.rpartition(".")[2], *where)
            if experts.idle and names:
                self.idle.append(f"{layer.name}.{path}: experts {', '.join(map(str, experts.idle))}")
        layer.routed.clear()
        return found

    def stored(self, name: str) -> str:
        """Return a weight's name in the checkpoint, or a stack's own."""
        return name if name in self.merged.experts.stacks else self.merged.model.stored.get(name, name)

    def matrix(self, name: str) -> Tensor:
        """Return a linear's weight, (N, K) in its dtype in the checkpoint."""
        return self.merged.matrix(self.stored(name)).to(self.layered.device)

    def nearest(self, name: str) -> Tensor:
        """Return a loaded weight after quantization to the nearest codes."""
        how = (self.quant.quant_type, self.quant.blocksize, self.quant.double_quant)
        if name in self.merged.experts.stacks:
            stack = self.layered.model.get_parameter(name)
            return ops.dequantize_4bit(*ops.quantize_stack(stack.to(self.layered.stored), stack.shape, *how, name))
        return ops.dequantize_4bit(*ops.quantize_4bit(self.matrix(name), *how, name))

    def put(self, name: str, W: Tensor) -> None:
        """Set a loaded weight of the model, (N, K) for a linear."""
        self.layered.model.get_parameter(name).copy_(W.T if self.stored(name) in self.merged.turned else W)

    def losses(self, streams: dict[str, list[Row]], rows: Rows) -> dict[str, Losses]:
        """Return the losses from the last layer's outputs, by form of the base."""
        batches, found = [*rows.data, *rows.general], {}
        with self.layered.recorded(with_head=True) as recorders:
            for form in self.forms:
                if form == NEAREST:  # the first one in 4 bits
                    self.round_beside()
                each = list(self.layered.losses(streams[form], batches, recorders[-1]))
                data, general = mean(each[: len(rows.data)]), mean(each[len(rows.data) :])
                found[form] = Losses(data=data, general=general)
        return found


def mean(losses: list[tuple[float, int]]) -> float:
    """Return the mean of sums of losses over their numbers of tokens."""
    return sum(total for total, _ in losses) / sum(count for _, count in losses)


def start_targets(merged: Merged, lora: LoraSettings) -> dict[str, int]:
    """Return the weights that LoRA trains, of those in 4 bits, with their ranks."""
    linears = [name.removesuffix(".weight") for name in merged.model.linears]
    found = adapted_linears(lora, linears)
    if lora.target_modules == "all-linear":
        targets = all_linear(merged.model.modules, linears)
        found = [name for name in found if is_target(name, targets)]
    return {f"{name}.weight": lora.rank_of(name) for name in found}
