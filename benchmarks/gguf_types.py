"""Each GGUF type of a real model: bytes and perplexity, with and without an importance matrix, beside llama.cpp's own.

    python -m benchmarks.gguf_types FOLDER [--outtypes q4_k_m ...] [--transformers]        needs llama-cpp-python

The model is SmolLM2-135M-Instruct in bfloat16 (benchmarks/real.py). Perplexity is that of all tokens after the first of
each document: held-out rows of GSM8K, and topics of Python's own help. The importance matrix is of GSM8K's training
rows. A file is read by llama.cpp, whose products have activations of 8 bits, and by transformers, which dequantizes it.
llama.cpp's own files are made by its quantizer from our BF16 file, with the same importance matrix. FOLDER keeps the
matrix and the numbers of finished types, so that a second call goes on.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp  # type: ignore
import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

from benchmarks.measure import table, write_result
from benchmarks.real import DATA, examples, make_model
from onecard.api import export
from onecard.config import ExportConfig, make_config
from onecard.export.calibrated.rows import general_pieces
from onecard.export.gguf.importance import read_importance
from onecard.export.gguf.mix import BASES
from onecard.hf.load import load_tokenizer

MEASURED = {"gsm8k": 1280, "general": 640}  # tokens at least
PIECE = 256
NUM_ROWS = 24  # of 1,024 tokens, for the importance matrix
PLAIN = ("bf16", "f16", "q8_0")
HEADER = ["type", "importance", "bytes", "GSM8K in transformers", "general", "ours, GSM8K",
          "its own, GSM8K", "ours, general", "its own, general", "ours / its own"]  # fmt: skip
Documents = dict[str, list[list[int]]]


def documents(model: Path) -> Documents:
    """Return the documents of each text, as tokens."""
    general = general_pieces(load_tokenizer(str(model)), PIECE)
    found = {"gsm8k": examples(model, DATA / "eval_100.jsonl"), "general": general[:: len(general) // 8]}
    return {name: list(first([list(each.input_ids) for each in some], MEASURED[name])) for name, some in found.items()}


def first(rows: list[list[int]], tokens: int) -> Iterator[list[int]]:
    """Yield rows until they have so many tokens."""
    for ids in rows:
        if tokens <= 0:
            return
        tokens -= len(ids)
        yield ids


def perplexities(texts: Documents, logits: Callable[[list[int]], torch.Tensor]) -> dict[str, float]:
    """Return the perplexity of each text. `logits` returns those of a document, (T, V)."""
    found = {}
    for name, rows in texts.items():
        total = sum(
            float(torch.nn.functional.cross_entropy(logits(ids)[:-1].float(), torch.tensor(ids[1:]), reduction="sum"))
            for ids in rows
        )
        found[name] = math.exp(total / sum(len(ids) - 1 for ids in rows))
    return found


@torch.no_grad()
def in_transformers(file: Path, texts: Documents) -> dict[str, float]:
    packed = getattr(transformers, "GgufConfig", None)  # releases with it keep the weights quantized by default
    more = {} if packed is None else {"quantization_config": packed(dequantize=True)}
    place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32, **more)
    return perplexities(texts, lambda ids: model(torch.tensor([ids])).logits[0])


def in_llama_cpp(file: Path, texts: Documents) -> dict[str, float]:
    longest = max(len(ids) for rows in texts.values() for ids in rows)
    threads = dict.fromkeys(("n_threads", "n_threads_batch"), torch.get_num_threads())
    model = llama_cpp.Llama(str(file), n_ctx=longest, n_batch=longest, logits_all=True, verbose=False, **threads)

    def logits(ids: list[int]) -> torch.Tensor:
        model.reset()
        model.eval(ids)
        return torch.from_numpy(np.array(model.scores[: len(ids)]))

    found = perplexities(texts, logits)
    model.close()
    return found


def own_file(source: Path, target: Path, outtype: str, matrix: Path | None) -> Path:
    """Quantize a file with llama.cpp's own quantizer."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = int(BASES[outtype][1]), torch.get_num_threads()
    entry, entries = llama_cpp.llama_model_imatrix_data, []
    if matrix is not None:
        found = read_importance(matrix)
        for name, sums in found.sums.items():
            mean = (sums / found.counts[name][:, None]).reshape(-1).tolist()
            entries.append(entry(name.encode(), (ctypes.c_float * len(mean))(*mean), len(mean)))
        params.imatrix = (entry * (len(entries) + 1))(*entries, entry(None, None, 0))
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    assert code == 0, outtype
    return target


def measure(
    model: Path, folder: Path, outtype: str, matrix: Path | None, texts: Documents, plain: bool
) -> dict[str, Any]:
    """Write both files, measure them and remove them."""
    file, source = folder / f"{outtype}.gguf", folder / "bf16.gguf"
    for old in folder.glob(f"{outtype}.*"):
        if old != source:
            old.unlink()
    if file != source or not source.exists():
        place = {"format": "gguf", "model": str(model), "output": str(file), "outtype": outtype}
        export(make_config(ExportConfig, {**place, "imatrix": matrix and str(matrix)}))
    found: dict[str, Any] = {"bytes": file.stat().st_size}
    found |= {"ours": in_llama_cpp(file, texts)}
    if plain:
        found |= {"transformers": in_transformers(file, texts)}
    if file != source:
        file.unlink()
        own = own_file(source, folder / "own.gguf", outtype, matrix)
        found |= {"own_bytes": own.stat().st_size, "own": in_llama_cpp(own, texts)}
        own.unlink()
    return found


def row(outtype: str, importance: str, found: dict[str, Any]) -> list[str]:
    number = "{:.3f}".format
    read, ours, own = found.get("transformers"), found["ours"], found.get("own")
    cells = [
        outtype,
        importance,
        f"{found['bytes']:,}",
        *("" if read is None else number(read[name]) for name in MEASURED),
    ]
    shares = "" if own is None else ", ".join(f"{ours[name] / own[name] - 1:+.2%}" for name in MEASURED)
    for name in MEASURED:
        cells += [number(ours[name]), "" if own is None else number(own[name])]
    return [*cells, shares]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--outtypes", nargs="+", default=list(BASES), choices=list(BASES))
    parser.add_argument("--transformers", action="store_true", help="read the files with transformers, too")
    args = parser.parse_args()
    args.folder.mkdir(exist_ok=True)
    model, matrix, kept = make_model(), args.folder / "gsm8k.imatrix", args.folder / "numbers.json"
    numbers: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    texts = documents(model)
    if not matrix.exists():
        place = {"format": "gguf", "model": str(model), "output": str(args.folder / "first.gguf"), "outtype": "q4_0"}
        rows = {"data": str(DATA / "train_300.jsonl"), "num_rows": NUM_ROWS}
        export(make_config(ExportConfig, {**place, **rows, "imatrix": str(matrix)}))
        (args.folder / "first.gguf").unlink()
    for outtype in args.outtypes:
        for importance in ("no",) if outtype in PLAIN else ("no", "yes"):
            key = f"{outtype} {importance}"
            if key not in numbers:
                given = matrix if importance == "yes" else None
                numbers[key] = measure(model, args.folder, outtype, given, texts, args.transformers)
                kept.write_text(json.dumps(numbers, indent=1))
            print("  ".join(row(outtype, importance, numbers[key])), flush=True)
    rows = [row(key.split()[0], key.split()[1], found) for key, found in numbers.items()]
    tokens = {name: sum(len(ids) - 1 for ids in some) for name, some in texts.items()}
    note = (
        f"Perplexities of {tokens['gsm8k']:,} tokens of GSM8K's held-out rows and {tokens['general']:,} of Python's "
        "help. The first two are of our file in transformers, the others of files in llama.cpp (llama-cpp-python "
        f"{llama_cpp.__version__}): ours, and that of its own quantizer. The last column is the difference of the two, "
        "for GSM8K and general text."
    )
    print(write_result("gguf_types_135m", "GGUF types of SmolLM2-135M", f"{note}\n\n{table(HEADER, rows)}"))


if __name__ == "__main__":
    main()
