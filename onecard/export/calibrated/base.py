"""A 4-bit base calibrated on rows of data, in bitsandbytes' format, with a low-rank start for LoRA if wanted.

calibrator.py runs the layers. The same pass measures what the 4 bits cost: the losses of a few rows through the 16-bit
weights, the nearest codes and the calibrated ones. General text keeps the base from narrowing: it is a part of the
calibration, and other pieces of it are measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file, save_file

from onecard.adapter.origin import sample_base
from onecard.adapter.start import Start
from onecard.config import LoraSettings, QuantConfig, QuantizeConfig
from onecard.data.dataset import Dataset
from onecard.errors import Stopped, UserError
from onecard.export.calibrated.bill import FILE, Bill, read_bill
from onecard.export.calibrated.calibration import count_tokens
from onecard.export.calibrated.calibrator import Calibrator
from onecard.export.calibrated.check import check_layers
from onecard.export.calibrated.room import check_memory, width
from onecard.export.calibrated.rows import choose_rows
from onecard.export.folder import check_room, exists, new_folder
from onecard.export.merge.merged import Merged, open_merged
from onecard.export.merge.quantized import Writer4bit, check_type
from onecard.files import sha256
from onecard.hf.checkpoint import inspect_checkpoint
from onecard.hf.load import find_checkpoint, load_tokenizer, pick_device
from onecard.hf.skeleton import read_config
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


@dataclass
class Source:
    """What a calibrated base is made from.

    Attributes:
        model: a checkpoint in 16 or 32 bits.
        validation: the rows that are measured; None: some that the calibration leaves.
        num_tokens: calibration tokens of the data. None: as many as the widest input, at least LEAST_TOKENS.
        lora: settings of the LoRA whose start corrects what the 4 bits leave; None: no start.
    """

    model: str
    quant: QuantConfig
    training: Dataset
    validation: Dataset | None = None
    num_tokens: int | None = None
    lora: LoraSettings | None = None

    def open(self) -> Merged:
        """Open the model. Raises UserError for one in 4 bits, and for int4."""
        check_type(self.quant)
        checkpoint = inspect_checkpoint(find_checkpoint(self.model))
        if checkpoint.is_4bit or checkpoint.is_mxfp4:
            do = "pass the 16-bit checkpoint, or leave calibrate out"
            raise UserError("a model to calibrate must be in 16 or 32 bits", "4 bits", do, self.model)
        merged = open_merged(self.model, None, "original")
        if merged.model.kept:
            do = "leave calibrate out: training keeps these weights as they are"
            must, found = "a model to calibrate must be in 16 or 32 bits", ", ".join(checkpoint.kinds)
            raise UserError(must, found, do, self.model)
        return merged

    def identity(self, merged: Merged) -> dict[str, str]:
        """Return what determines the base of the opened model and its measurement, apart from the general text."""
        sample = sample_base(merged.checkpoint, merged.model.modules, merged.model.linears, "nf4", 64)
        found = {
            "model": sample.digest(),
            "rows": self.training.fingerprint(),
            "calibration_tokens": str(self.num_tokens),
        }
        found |= {key: str(getattr(self.quant, key)) for key in ("quant_type", "blocksize", "double_quant")}
        found["max_seq_length"] = str(self.training.max_seq_length)
        if self.validation is not None:
            found["validation rows"] = self.validation.fingerprint()
        lora = self.lora
        if lora is not None:
            found |= {"init_lora_weights": "loftq", "r": str(lora.r), "target_modules": str(lora.target_modules)}
            more = ("exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern")
            found |= {key: str(getattr(lora, key)) for key in more if getattr(lora, key)}
        return found


def calibrate_base(
    source: Source,
    output: Path,
    tokenizer: Any,
    device: str,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> Written:
    """Write a calibrated 4-bit checkpoint, or return the one in `output` if it was made from the same.

    Args:
        output: its new folder.
        on_layer: called after each decoder layer with its number and their count.

    Raises:
        UserError: a checkpoint in 4 bits; int4; a folder that was made from something else; no room on the disk;
            a weight that is not in the checkpoint.
    """
    merged = source.open()
    made_from = source.identity(merged)
    if output.exists():
        return read_base(output, made_from)
    begin = time.perf_counter()
    calibrator = Calibrator(merged, source.quant, source.lora, pick_device(device))
    check_layers(calibrator.layered, source.training.examples)
    num_tokens = source.num_tokens or max(LEAST_TOKENS, *map(width, merged.model.quantized.values()))
    rows = choose_rows(source.training, source.validation, tokenizer, calibrator.layered.is_packed, num_tokens)
    check_room(output, merged.nbytes // 2)
    check_memory(calibrator.layered, rows, len(calibrator.forms), calibrator.rank)
    with new_folder(output) as folder:
        writer = Writer4bit(merged, folder, source.quant)
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


def source_of_run(prepared: Prepared) -> Source:
    """Return what a training run's base is made from. It is measured on the rows of the first eval file."""
    config = prepared.config
    lora = config if config.init_lora_weights == "loftq" else None
    validation = next(iter(prepared.validation.values()), None)
    return Source(config.model, config, prepared.training, validation, config.calibration_tokens, lora)


def check_base_of_run(prepared: Prepared) -> None:
    """Make the checks of `base_of_run` that need no weights."""
    source, output = source_of_run(prepared), Path(prepared.config.output) / "base"
    made_from = source.identity(source.open())
    if output.exists():
        read_base(output, made_from)


def base_of_run(prepared: Prepared, console: Console) -> CalibratedBase:
    """Calibrate the base of a training run in its output folder, or find it there."""
    config = prepared.config
    console.rule("calibration", align="left")
    output = Path(config.output) / "base"
    with layers_shown(console) as shown:
        found = calibrate_base(source_of_run(prepared), output, prepared.tokenizer, config.device, shown)
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
    source = Source(model, config, dataset, num_tokens=config.calibration_tokens)
    try:
        with signals.raised(), layers_shown(console) as shown:
            return calibrate_base(source, target, load_tokenizer(model), config.device, shown).bill
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
