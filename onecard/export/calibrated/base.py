"""A 4-bit base calibrated on rows of data, in bitsandbytes' format, with a low-rank start for LoRA if wanted.

Each decoder layer is read in 16 bits and run on calibration rows, whose hidden states are the calibrated layers' so
far. feedback.py chooses its codes and scales for these inputs, and its file gets them. Memory holds one layer.

The same pass measures what the 4 bits cost: the losses of a few rows through the 16-bit weights, the nearest codes and
the calibrated ones. General text keeps the base from narrowing: it is a part of the calibration, and other pieces of it
are measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor

from onecard.adapter.layers import adapted_linears, all_linear, is_target
from onecard.adapter.origin import sample_base
from onecard.adapter.start import Start
from onecard.config import LoraSettings, QuantConfig, QuantizeConfig
from onecard.data.dataset import Dataset
from onecard.errors import Stopped, UserError
from onecard.export.calibrated.bill import CALIBRATED, FILE, NEAREST, SIXTEEN, STARTED, Bill, Losses, read_bill
from onecard.export.calibrated.calibration import Layer, calibrate, count_tokens
from onecard.export.calibrated.check import check_layers
from onecard.export.calibrated.experts import RoutedExperts
from onecard.export.calibrated.feedback import Factor, quantize, quantize_with_start
from onecard.export.calibrated.hessian import Inputs
from onecard.export.calibrated.layers import LayeredModel, Row
from onecard.export.calibrated.room import check_memory, width
from onecard.export.calibrated.rows import Rows, choose_rows
from onecard.export.folder import check_room, exists, new_folder
from onecard.export.merge.merged import Merged, open_merged
from onecard.export.merge.quantized import Writer4bit, check_type
from onecard.files import sha256
from onecard.hf.checkpoint import inspect_checkpoint
from onecard.hf.load import find_checkpoint, load_tokenizer, pick_device
from onecard.hf.skeleton import read_config
from onecard.kernels import ops
from onecard.quant.state import QuantState
from onecard.train import signals
from onecard.train.evaluate import model_size
from onecard.train.prepare import Prepared
from onecard.train.session import CalibratedBase

START = "start/start.safetensors"  # not beside config.json, where other tools read every safetensors file
LEAST_TOKENS = 4096  # of calibration, where the number is not given


@dataclass
class Written:
    """A written base. `start` is empty if none was wanted. `measured` is None if an earlier run wrote it."""

    folder: Path
    bill: Bill
    start: Start
    measured: Dataset | None = None


def calibrate_base(
    model: str,
    output: Path,
    quant: QuantConfig,
    training: Dataset,
    validation: Dataset | None,
    tokenizer: Any,
    num_tokens: int | None,
    device: str,
    lora: LoraSettings | None = None,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> Written:
    """Write a calibrated 4-bit checkpoint, or return the one in `output` if it was made from the same.

    Args:
        model: a checkpoint in 16 or 32 bits.
        output: its new folder.
        num_tokens: calibration tokens of the data. None: as many as the widest input, at least LEAST_TOKENS.
        lora: settings of the LoRA whose start corrects what the 4 bits leave; None: no start.
        on_layer: called after each decoder layer with its number and their count.

    Raises:
        UserError: a checkpoint in 4 bits; int4; a folder that was made from something else; no room on the disk;
            a weight that is not in the checkpoint.
    """
    merged, made_from = open_base(model, quant, training, validation, num_tokens, lora)
    if output.exists():
        return read_base(output, made_from)
    begin = time.perf_counter()
    calibrator = Calibrator(merged, quant, lora, pick_device(device))
    check_layers(calibrator.layered, training.examples)
    num_tokens = num_tokens or max(LEAST_TOKENS, *map(width, merged.model.quantized.values()))
    rows = choose_rows(training, validation, tokenizer, calibrator.layered.is_packed, num_tokens)
    check_room(output, merged.nbytes // 2)
    check_memory(calibrator.layered, rows, len(calibrator.forms), calibrator.rank)
    with new_folder(output) as folder:
        writer = Writer4bit(merged, folder, quant)
        losses = calibrator.run(rows, writer, on_layer)
        left = [name for name in writer.left if name in merged.linears or name in merged.experts.stacks]
        nearest = [*left, *calibrator.idle]
        writer.finish()
        if calibrator.start:
            (folder / START).parent.mkdir()
            both = {f"{name}.{key}": t for name, pair in calibrator.start.items() for key, t in zip("AB", pair)}
            save_file({name: tensor.contiguous() for name, tensor in both.items()}, folder / START)
        tokens = {"calibration": count_tokens(rows.calibration), "data": count_tokens(rows.data)}
        tokens["general text"] = count_tokens(rows.general)
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        bill = Bill(
            made_from=made_from, measured_on=rows.measured_on, tokens=tokens, losses=losses, nearest=nearest,
            seconds=time.perf_counter() - begin, files={name: sha256(folder / name) for name in files},
        )  # fmt: skip
        (folder / FILE).write_text(bill.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return Written(output, bill, calibrator.start, rows.measured)


def open_base(
    model: str,
    quant: QuantConfig,
    training: Dataset,
    validation: Dataset | None,
    num_tokens: int | None,
    lora: LoraSettings | None,
) -> tuple[Merged, dict[str, Any]]:
    """Check a model to calibrate. Return it, and what its calibrated base would be made from."""
    check_type(quant)
    checkpoint = inspect_checkpoint(find_checkpoint(model))
    if checkpoint.is_4bit or checkpoint.is_mxfp4:
        do = "pass the 16-bit checkpoint, or leave calibrate out"
        raise UserError("a model to calibrate must be in 16 or 32 bits", "4 bits", do, model)
    merged = open_merged(model, None, "original")
    return merged, identity(merged, quant, training, validation, num_tokens, lora)


def check_base_of_run(prepared: Prepared) -> None:
    """Make the checks of `base_of_run` that need no weights."""
    config, output = prepared.config, Path(prepared.config.output) / "base"
    lora = config if config.init_lora_weights == "loftq" else None
    data = (prepared.training, held_out(prepared), config.calibration_tokens)
    _, made_from = open_base(config.model, config, *data, lora)
    if output.exists():
        read_base(output, made_from)


def held_out(prepared: Prepared) -> Dataset | None:
    """Return the rows that a run's calibration is measured on: its first eval file."""
    return next(iter(prepared.validation.values()), None)


def base_of_run(prepared: Prepared, console: Console) -> CalibratedBase:
    """Calibrate the base of a training run in its output folder, or find it there."""
    config = prepared.config
    lora = config if config.init_lora_weights == "loftq" else None
    console.rule("calibration", align="left")
    output = Path(config.output) / "base"
    where = (config.model, output, config, prepared.training, held_out(prepared), prepared.tokenizer)
    with layers_shown(console) as shown:
        found = calibrate_base(*where, config.calibration_tokens, config.device, lora, shown)
    bill = found.bill
    for line in bill.lines():
        console.print(line, highlight=False, markup=False)
    return CalibratedBase(output, found.start, bill.facts(), found.measured, bill.losses[bill.best].data)


def quantize_calibrated(model: str, output: str, config: QuantizeConfig, dataset: Dataset, console: Console) -> Bill:
    """Write a calibrated 4-bit checkpoint in a new folder. Return its bill.

    Raises:
        UserError: an output that exists; a token that the model does not have; same as `calibrate_base`.
        Stopped: Ctrl-C, SIGTERM or SIGHUP.
    """
    target = Path(output)
    if target.exists():
        raise exists(target)
    dataset.check_fits(*model_size(read_config(find_checkpoint(model))))
    where = (model, target, config, dataset, None, load_tokenizer(model))
    try:
        with signals.raised(), layers_shown(console) as shown:
            return calibrate_base(*where, config.calibration_tokens, config.device, None, shown).bill
    except signals.Signalled as error:
        raise Stopped(error.number, "nothing is kept", "start again", output) from None


@contextmanager
def layers_shown(console: Console) -> Iterator[Callable[[int, int], None]]:
    """Show a bar. Yield a function that sets it to a number of layers out of their count."""
    quiet = not console.is_terminal
    if quiet:
        console.print("the decoder layers, one after another")
    with Progress(*Progress.get_default_columns(), console=console, transient=True, disable=quiet) as progress:
        bar = progress.add_task("decoder layers")
        yield lambda done, total: progress.update(bar, completed=done, total=total)


def identity(
    merged: Merged,
    quant: QuantConfig,
    training: Dataset,
    validation: Dataset | None,
    num_tokens: int | None,
    lora: LoraSettings | None,
) -> dict[str, str]:
    """Return what determines a calibrated base and its measurement, apart from the general text."""
    how = {key: str(getattr(quant, key)) for key in ("quant_type", "blocksize", "double_quant")}
    sample = sample_base(merged.checkpoint, merged.model.modules, merged.model.linears, "nf4", 64)
    found = {"model": sample, "rows": training.fingerprint(), "calibration_tokens": str(num_tokens), **how}
    found["max_seq_length"] = str(training.max_seq_length)
    if validation is not None:
        found["validation rows"] = validation.fingerprint()
    if lora is not None:
        found |= {"init_lora_weights": "loftq", "r": str(lora.r), "target_modules": str(lora.target_modules)}
        more = ("exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern")
        found |= {key: str(getattr(lora, key)) for key in more if getattr(lora, key)}
    return found


def read_base(folder: Path, made_from: dict[str, str]) -> Written:
    """Read a base that an earlier run has written.

    Raises:
        UserError: it was made from something else; a file is missing or has changed.
    """
    bill = read_bill(folder)
    for key in sorted(bill.made_from.keys() | made_from.keys()):
        before, now = bill.made_from.get(key, "none"), made_from.get(key, "none")
        if before != now:
            found = f"other {key}" if key in ("model", "rows", "validation rows") else f"{key} {before}, now {now}"
            do = "go on with the same model, data and settings, or choose another --output"
            raise UserError("a run must go on with the base that it calibrated", found, do, str(folder))
    for name, digest in bill.files.items():
        path = folder / name
        if not path.is_file() or sha256(path) != digest:
            found = "other bytes" if path.is_file() else "no such file"
            do = f"delete {folder}, so that it is calibrated again, or choose another --output"
            raise UserError("a calibrated base's files must be as the run wrote them", found, do, str(path))
    start: Start = {}
    if START in bill.files:
        tensors = load_file(folder / START)
        names = {name.rpartition(".")[0] for name in tensors}
        start = {name: (tensors[f"{name}.A"], tensors[f"{name}.B"]) for name in names}
    return Written(folder, bill, start)


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
