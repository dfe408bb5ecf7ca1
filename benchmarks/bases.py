"""Published forms of one base, each trained on: equality with the form's own dequantizer, bytes, load peak and losses.

    python -m benchmarks.bases [--forms w4a16 ...] [--steps 10]

The base is SmolLM2-135M-Instruct in bfloat16 (benchmarks/real.py), written in each form by our exports. Each form's
weights are compared with those that its own package computes. Then a process loads the form, and takes a few steps on
GSM8K's rows with r = 16. bitsandbytes + peft does the same on the bfloat16 base and on the base in its own format. A
package that is not installed is named (GPTQ and AWQ: gptqmodel; MLX: mlx).

Bytes are those of parameters and scales. Peak counts anonymous memory above the process's start (benchmarks/load.py).
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.load import onecard_bytes
from benchmarks.measure import MB, anonymous_peak, run_child, status_bytes, table, write_result
from benchmarks.real import DATA, LENGTH, batches, examples, make_loader, make_model
from benchmarks.served import as_chats
from benchmarks.train import RANK, load_onecard, load_peer, onecard_steps, peer_steps
from onecard.api import export
from onecard.config import ExportConfig, QuantConfig, make_config
from onecard.export.merge.quantized import quantize_checkpoint
from onecard.export.readers import load_in_bitsandbytes
from onecard.hf.checkpoint import inspect_checkpoint
from onecard.hf.load import load_model
from onecard.hf.stored import TensorInfo

GROUP = 64  # 576 inputs are 9 groups of 64
HEADER = ["base", "equal to", "bytes in memory", "load peak", "step peak", "first loss", "last loss"]
Weights = Iterator[tuple[str, Tensor]]


def write(form: str, model: Path, folder: Path) -> Path:
    """Write the base in a form. Return the folder, or the file."""
    if form == "bfloat16":
        return model
    if form == "nf4":
        return quantize_checkpoint(str(model), str(folder / form), QuantConfig())
    fields: dict[str, Any] = {"format": form, "model": str(model), "output": str(folder / form), "base": "original"}
    if form == "q4_k_m":
        fields |= {"format": "gguf", "outtype": form, "output": str(folder / f"{form}.gguf")}
    if form in ("gptq", "awq", "w4a16"):
        fields |= {"group_size": GROUP, "device": "cpu"}
    if form == "awq":
        rows = as_chats(DATA / "train_300.jsonl", folder / "rows.jsonl")
        fields |= {"data": str(rows), "num_rows": 8, "max_seq_length": LENGTH}
    return export(make_config(ExportConfig, fields, "benchmark")).path


def of_bitsandbytes(path: Path) -> Weights:
    import bitsandbytes

    functional: Any = bitsandbytes.functional  # type: ignore
    for name, module in load_in_bitsandbytes(path, "cpu").named_modules():
        weight: Any = getattr(module, "weight", None)
        if hasattr(weight, "quant_state"):
            yield f"{name}.weight", functional.dequantize_4bit(weight.data, weight.quant_state)


def of_gptqmodel(path: Path) -> Weights:
    from transformers import AutoModelForCausalLM, GPTQConfig

    how = {"device_map": "cpu", "quantization_config": GPTQConfig(bits=4, backend="gptq_torch")}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float16, **how)
    for name, module in model.named_modules():
        module: Any
        if hasattr(module, "dequantize_weight"):
            module.dequant_dtype = torch.int8
            yield f"{name}.weight", module.dequantize_weight().T


def of_gptqmodel_awq(path: Path) -> Weights:
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm  # type: ignore

    tensors = load_file(path / "model.safetensors")
    for name in [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]:
        parts = (tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales"))
        yield f"{name}.weight", dequantize_gemm(*parts, 4, GROUP).T


def of_compressed_tensors(path: Path) -> Weights:
    from compressed_tensors.compressors import unpack_fp4_from_uint8, unpack_from_int32
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    tensors = load_file(path / "model.safetensors")
    groups = json.loads((path / "config.json").read_text())["quantization_config"]["config_groups"]
    args = QuantizationArgs.model_validate(groups["group_0"]["weights"])
    for name in [key.removesuffix(".weight_scale") for key in tensors if key.endswith(".weight_scale")]:
        scale, whole = tensors[f"{name}.weight_scale"].float(), tensors.get(f"{name}.weight_global_scale")
        packed = tensors.get(f"{name}.weight_packed")
        if packed is None:
            codes = tensors[f"{name}.weight"].float()
        elif packed.dtype == torch.uint8:
            codes = unpack_fp4_from_uint8(packed, len(packed), 2 * packed.shape[1], dtype=torch.float32)
        else:
            codes = unpack_from_int32(packed, 4, torch.Size(tensors[f"{name}.weight_shape"].tolist())).float()
        W = dequantize(codes, scale, args=args, dtype=torch.float32, global_scale=whole)
        yield f"{name}.weight", W


def of_mlx(path: Path) -> Weights:
    import mlx.core as mx  # type: ignore

    tensors = mx.load(str(path / "model.safetensors"))
    for name in [key.removesuffix(".scales") for key in tensors if key.endswith(".scales")]:
        scales, biases = (tensors[f"{name}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
        W = mx.dequantize(tensors[f"{name}.weight"], scales, biases, group_size=64, bits=4)
        yield f"{name}.weight", torch.tensor(W.tolist())


REFERENCES: dict[str, tuple[str, Callable[[Path], Weights]]] = {
    "nf4": ("bitsandbytes", of_bitsandbytes),
    "gptq": ("GPTQModel", of_gptqmodel),
    "awq": ("GPTQModel", of_gptqmodel_awq),
    "w4a16": ("compressed-tensors", of_compressed_tensors),
    "nvfp4": ("compressed-tensors", of_compressed_tensors),
    "fp8": ("compressed-tensors", of_compressed_tensors),
    "mlx": ("mlx", of_mlx),
}
FORMS = ("bfloat16", *REFERENCES, "q4_k_m")


def values(info: TensorInfo) -> Tensor:
    """Return a stored weight before it is rounded to the checkpoint's 16 bits."""
    assert info.form is not None
    return info.form.rows(0, info.shape[0])


def equality(form: str, path: Path) -> str:
    """Compare all weights of a form with those of its package. Return a cell of the table."""
    if form not in REFERENCES:
        return ""
    package, reference = REFERENCES[form]
    compared = wrong = 0
    stored = {} if form == "nf4" else inspect_checkpoint(path).tensors
    modules = dict(load_model(str(path), device="cpu").named_modules()) if form == "nf4" else {}
    try:
        for name, W in reference(path):
            module = modules.get(name.removesuffix(".weight"))
            found = values(stored[name]) if module is None else module.dequantize()
            compared, wrong = compared + 1, wrong + (not torch.equal(found.to(W.dtype), W))
    except ImportError as error:
        return f"not installed: {error.name}"
    assert compared >= 200, compared
    return f"{package}, {compared - wrong} of {compared} weights"


def child(args: argparse.Namespace) -> None:
    """Load a form, take the steps, and print what it took."""
    import bitsandbytes  # noqa: F401  both contenders do the same imports before the clock starts

    import onecard.hf.load  # noqa: F401

    path, is_ours, rows = Path(args.path), args.child == "onecard", examples(make_model(), DATA / "train_300.jsonl")
    begin = status_bytes("RssAnon")
    with anonymous_peak() as peak:
        base = load_onecard(args, path) if is_ours else load_peer(args, path)
    size = onecard_bytes(base) if is_ours else peer_bytes(base)
    args.length, args.recompute = LENGTH, False
    loader = make_loader(rows)
    with anonymous_peak() as step_peak:
        if is_ours:
            found = [loss for _, loss in onecard_steps(args, path, base, loader)]
        else:
            steps = zip(range(args.steps), peer_steps(args, base, batches(loader)))
            found = [loss for _, (_, loss) in steps]
    peaks = {"load": peak[0] - begin, "step": step_peak[0] - begin}
    print(json.dumps({"bytes": size, **peaks, "losses": found}))


def peer_bytes(model: Any) -> int:
    """Return the bytes of a bitsandbytes model's parameters and scales."""
    total = sum(p.nbytes for p in model.parameters())
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        nested = getattr(state, "state2", None)
        total += sum(part.absmax.nbytes for part in (state, nested) if part is not None)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--child", choices=("onecard", "bnb"))
    parser.add_argument("--path")
    args = parser.parse_args()
    if args.child:
        return child(args)
    model, lines = make_model(), []
    with tempfile.TemporaryDirectory() as name:
        for form in args.forms:
            path = write(form, model, Path(name))
            cells = equality(form, path)
            for contender in ("onecard", "bnb") if form in ("bfloat16", "nf4") else ("onecard",):
                call = ("--child", contender, "--path", str(path), "--steps", str(args.steps))
                found = run_child("benchmarks.bases", *call)
                sizes = [f"{found[key] / MB:.1f} MB" for key in ("bytes", "load", "step")]
                losses = [f"{found['losses'][i]:.4f}" for i in (0, -1)]
                label = form if contender == "onecard" else f"{form}, bitsandbytes + peft"
                lines.append([label, cells if contender == "onecard" else "", *sizes, *losses])
                print("  ".join(lines[-1]), flush=True)
            if path != model:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    note = f"{args.steps} steps on GSM8K's rows with r = {RANK}, all activations kept. Integers have groups of {GROUP}."
    print(write_result("bases_135m", "Bases as they are published", f"{note}\n\n{table(HEADER, lines)}"))


if __name__ == "__main__":
    main()
