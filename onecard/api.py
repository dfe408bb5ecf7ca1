"""Functions for whole jobs from Python. They run the same code as the command line and print nothing by default."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from onecard.config import ExportConfig, TrainConfig

if TYPE_CHECKING:
    from onecard.train.result import Result


def train(config: TrainConfig, *, resume: bool = False, quiet: bool = True) -> Result:
    """Train a LoRA adapter over a frozen 4-bit base, as `onecard train` does.

    Args:
        config: all settings of the run. `config.output` must be a new or empty folder, unless `resume` is true.
        resume: continue from the newest complete checkpoint in `config.output`. The result has the same bits as a run
            without an interruption; on a GPU with `config.deterministic`.
        quiet: print nothing. False prints what `onecard train` prints: the data, the memory plan and the progress.

    Returns:
        A Result. `adapter` is the folder of the adapter in peft's format (float32 tensors: lora_A (r, in), lora_B
        (out, r)). `metrics` has one dict for each logged update: step, loss in nats for each supervised token,
        learning_rate, grad_norm, memory in bytes. `report_path` is the HTML report. `model` is the tuned peft model
        in memory, in eval mode, and `tokenizer` is its tokenizer.

    Raises:
        UserError: a wrong setting, data file or checkpoint, no memory or no disk space. Most are raised before the
            weights load.
        Stopped: a UserError. Ctrl-C, SIGTERM or SIGHUP stopped the run. A run that was in its training loop has a
            checkpoint of its last update.
    """
    from onecard.export.calibrated.base import base_of_run
    from onecard.terminal import make_console, quiet_process
    from onecard.train.session import run_training

    with quiet_process():
        return run_training(config, resume, make_console(quiet), make_base=base_of_run)


def merge(model: str, adapter: str, output: str, *, base: Literal["dequantized", "original"] | None = None) -> Path:
    """Merge an adapter into a 16-bit checkpoint, as `onecard merge` does without --verify. Memory for about one tensor.

    Args:
        model: the checkpoint that the adapter was trained on: a folder, or a hub id if there is a network.
        adapter: the folder of the trained adapter. Its onecard.json says how training stored the base.
        output: a new folder.
        base: "dequantized", the default, adds the update to the weights that training saw. "original" adds it to the
            checkpoint's own weights.

    Returns:
        The output folder. Each tensor has the dtype of the checkpoint. Sums are in float32.

    Raises:
        UserError: an adapter that does not belong to the model, a damaged checkpoint, an output folder that is not
            new, no disk space.
    """
    from onecard.export.merge.merged import merge as run
    from onecard.terminal import quiet_process

    with quiet_process():
        return run(model, adapter, output, base)


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Attributes:
        path: the GGUF file, or the checkpoint's folder.
        lines: the text that `onecard export` prints: the result, notes, and the commands that use it.
    """

    path: Path
    lines: list[str]


def export(config: ExportConfig, *, quiet: bool = True) -> Exported:
    """Write a model, merged with an adapter if there is one, in another tool's format, as `onecard export` does.

    Args:
        config: the format, the model, the adapter, the new output, and the format's settings.
        quiet: print nothing. False prints on stderr how the data of a calibration was read.

    Returns:
        An Exported: the path, and the text that `onecard export` prints.

    Raises:
        UserError: an adapter that does not belong to the model, a model that the format cannot hold, an output that
            exists, no disk space, a package that is not installed.
    """
    from onecard.adapter.head import refuse_head
    from onecard.adapter.origin import STORED, stored_as, written_otherwise
    from onecard.export.folder import need_package
    from onecard.terminal import quiet_process, tell

    quant = stored_as(config.adapter, config.model_dump(include=set(STORED), exclude_unset=True))
    refuse_head(config.adapter, "export")
    on_data = None if quiet else tell
    with quiet_process():
        if config.format == "gguf":
            need_package("gguf", "gguf")
        rows = None
        if config.verify is not None:
            from onecard.export.verify import rows_to_verify, verify_export

            rows = rows_to_verify(config, on_data)
        if config.format == "gguf":
            from onecard.export.gguf.importance import importance_of
            from onecard.export.gguf.writer import export_gguf

            importance = importance_of(config, on_data)
            where = (config.model, config.adapter, config.output)
            written = export_gguf(*where, config, config.base, quant, importance)
            path, lines = written.file, written.lines()
        else:
            from onecard.export.calibrated.writer import export_folder

            where = (config.model, config.adapter, config.data, config.output)
            found = export_folder(config.format, *where, config, config.base, quant, on_data)
            path, lines = found.folder, found.lines()
        kind = config.outtype if config.format == "gguf" else config.format
        nearest = config.data is None and config.imatrix is None and config.base != "original"
        changed = {"group_size", "sym"} & config.model_dump(exclude_defaults=True).keys()
        notes = written_otherwise(config.adapter, kind, nearest and not changed)
        lines = [*(f"note     {note}" for note in notes), *lines]
        return Exported(path, lines if rows is None else [*verify_export(config, path, quant, rows), *lines])
