"""The commands that write a model: merged, in 4 bits, in another tool's format."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Any, Literal

from onecard.cli.app import DataWords, ExportFields, QuantizeFields, ReadFields, StoredFields, app
from onecard.config import DataConfig, ExportConfig, QuantizeConfig, make_config
from onecard.terminal import given, make_console, quiet_libraries, read_data


@app.command
def merge(
    model: str,
    adapter: str,
    output: str,
    *,
    base: Literal["dequantized", "original"] | None = None,
    verify: DataWords | None = None,
    requantize: Literal["nf4", "fp4"] | None = None,
    fields: ReadFields = None,
    quant: StoredFields = None,
    device: str = "cpu",
) -> None:
    """Merge an adapter into a 16-bit checkpoint, streaming: memory for about one tensor.

    Args:
        model: Checkpoint that the adapter was trained on.
        adapter: Folder of the trained adapter.
        output: New folder for the merged checkpoint.
        base: dequantized (default): what training saw, the nearest to the live adapter; original: the checkpoint's own
            weights. With --verify and no --base, both are tried and the better one is kept.
        verify: Data, as of train, on whose first rows, 32 and some 8,000 tokens at most, the result is compared with
            the live adapter.
        requantize: Store the result in 4 bits again, which loses part of the update. The share that remains is printed.
        device: Where --verify computes.
    """
    from onecard.adapter.head import labels_beside, refuse_head
    from onecard.adapter.origin import read_origin, stored_as, written_otherwise
    from onecard.hf.head import model_class
    from onecard.hf.skeleton import read_config

    quiet_libraries()
    if verify is not None or requantize is not None:
        refuse_head(adapter, "merge with --verify or --requantize")
    config = stored_as(adapter, given(quant))
    if read_origin(adapter) is None:
        stored = f"{config.quant_type}, {config.blocksize} a block"
        print(f"the adapter has no onecard.json: training is assumed to have quantized a 16-bit base as {stored}")
    small = None if requantize is None else config.model_copy(update={"quant_type": requantize})
    left, kept = None, base or "dequantized"
    if verify is not None:
        from onecard.export.verify import bases_of, merge_verified, rows_line

        dataset = read_data(verify, model, adapter, make_config(DataConfig, given(fields), "merge"))
        bases: list[Any] = [base] if base is not None else bases_of(model, small)
        print(rows_line(dataset), flush=True)
        found = merge_verified(model, adapter, output, dataset, bases, config, small, device)
        print("\n".join(found.table()))
        kept, left = found.kept, found.in_weights
    elif small is not None:
        from onecard.export.merge.quantized import requantize as run

        _, left = run(model, adapter, output, small, kept, config)
    else:
        from onecard.export.merge.merged import merge as run

        run(model, adapter, output, kept, config)
    print(f"merged   {output}  ({requantize or '16-bit'}, {kept} base)")
    for note in written_otherwise(adapter, requantize or "in 16 bits", kept == "dequantized"):
        print(f"note     {note}")
    if left is not None and left.share is not None:
        print(f"left     {left.share:.1%} of the update in the weights, with rounding errors of {left.noise:.1%} of it")
    if labels_beside(adapter):
        print(f"next\n  AutoModelForSequenceClassification.from_pretrained(...), or: onecard classify {quote(output)}")
    else:
        kind = model_class(read_config(Path(output))).__name__
        print(f"next\n  {kind}.from_pretrained(...) with transformers, or: vllm serve " + quote(output))


@app.command
def quantize(model: str, output: str, *, fields: QuantizeFields = None) -> None:
    """Write a checkpoint with its linears in 4 bits, in bitsandbytes' format, streaming.

    With --calibrate and --data, the codes are chosen for the layers' outputs on the data. Else they are the nearest.

    Experts go into 4 bits, too; such a checkpoint is for onecard, as transformers with bitsandbytes reads no 4-bit
    experts.

    Args:
        model: Checkpoint folder or hub id, in 16 or 32 bits.
        output: New folder.
    """
    quiet_libraries()
    config = make_config(QuantizeConfig, given(fields), "command line")
    reading = make_config(DataConfig, config.model_dump(include=set(DataConfig.model_fields)), "quantize")
    rows = None if config.verify is None else read_data(config.verify, model, None, reading)
    if config.calibrate:
        from onecard.export.calibrated.base import quantize_calibrated

        assert config.data is not None, "checked by the config"
        dataset = read_data(config.data, model, None, reading)
        lines = quantize_calibrated(model, output, config, dataset, make_console()).lines()
    else:
        from onecard.export.merge.quantized import quantize_checkpoint

        quantize_checkpoint(model, output, config)
        lines = []
    if rows is not None:
        from onecard.export.verify import verify_quantized

        lines += verify_quantized(model, Path(output), rows, config.device)
    print("\n".join([f"quantized {output}  ({config.quant_type})", *lines, "next"]))
    print(f"  onecard train --model {quote(output)} --weights-budget 4GiB ...")


@app.command
def export(*, fields: ExportFields = None) -> None:
    """Write a model, merged with an adapter if there is one, in another tool's format, streaming."""
    config = make_config(ExportConfig, given(fields), "command line")
    from onecard.api import export as run

    print("\n".join(run(config, quiet=False).lines))
