"""Memory and time of data of some gigabytes: tokenized, and read from the cache of an earlier run.

    python -m benchmarks.data [--megabytes 1000 2000 5000] [--format text]

Rows are those of GSM8K, shuffled and numbered, as chats or as texts of about 2,000 characters. Each measurement is a
process of its own: the dataset is loaded, its loader made, and the first micro-batch read. The memory is what the
process holds beyond its libraries: pages of the mapped file, which the system may drop, are not counted, and shown
beside it.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.measure import anonymous_peak, run_child, table, write_result
from benchmarks.real import DATA, LENGTH, PACKAGE, make_model

TEXT_ROWS = 4  # of GSM8K in a text


def make_rows(path: Path, megabytes: int, format: str) -> int:
    """Write a file of rows, and return their number."""
    rng, count = random.Random(0), 0
    rows = [json.loads(line) for line in (DATA / "train_300.jsonl").read_text(encoding="utf-8").splitlines()]
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < megabytes * 1e6:
            for _ in range(1000):
                count += 1
                some = [rng.choice(rows) for _ in range(TEXT_ROWS if format == "text" else 1)]
                row: dict[str, Any] = {"question": f"({count}) {some[0]['question']}", "answer": some[0]["answer"]}
                if format == "text":
                    row = {"text": f"{count}\n" + "\n\n".join(f"{each['question']}\n{each['answer']}" for each in some)}
                file.write(json.dumps(row) + "\n")
    return count


def child(args: argparse.Namespace) -> dict[str, Any]:
    from onecard.config import DataConfig
    from onecard.data.load import load_dataset
    from onecard.data.loader import Loader
    from onecard.hf.load import load_tokenizer

    tokenizer = load_tokenizer(str(make_model()))
    with anonymous_peak() as peak:
        first, begin = peak[0], time.perf_counter()
        config = DataConfig(max_seq_length=LENGTH, data_cache=args.cache)
        dataset = load_dataset(args.data, tokenizer, config)
        loader = Loader(dataset.examples, dataset.row_tokens, True, 1, 0)
        loader.next_batch()
        seconds = time.perf_counter() - begin
        mapped = psutil.Process().memory_info().shared
    return {
        "seconds": seconds,
        "memory": peak[0] - first,
        "mapped": mapped,
        "examples": len(dataset.examples),
        "tokens": dataset.num_tokens,
        "batches": loader.num_batches(0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, nargs="*", default=[1000, 2000, 5000])
    parser.add_argument("--format", choices=("text", "chat"), default="chat")
    parser.add_argument("--child", action="store_true")
    parser.add_argument("--data")
    parser.add_argument("--cache")
    args = parser.parse_args()
    if args.child:
        return print(json.dumps(child(args)))
    lines = []
    for megabytes in args.megabytes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.jsonl"
            rows = make_rows(path, megabytes, args.format)
            time.sleep(3)  # a file that was written just now is not kept
            for what in ("tokenized", "from the cache"):
                found = run_child("benchmarks.data", "--child", "--data", str(path), "--cache", f"{folder}/cache")
                print(megabytes, what, json.dumps(found), flush=True)
                sizes = [f"{found[key] / 1e6:,.0f}" for key in ("memory", "mapped")]
                counts = [f"{count:,}" for count in (rows, found["tokens"])]
                lines.append([f"{megabytes:,}", *counts, what, f"{found['seconds']:,.1f}", *sizes])
    header = ["MB of JSONL", "rows", "tokens", "", "seconds to the first micro-batch", "MB of memory", "MB mapped"]
    body = (
        f"Rows of format {args.format}, tokenizer of SmolLM2 ({PACKAGE}), rows of {LENGTH} tokens. Memory is what the "
        f"process holds beyond its libraries, without the pages of the mapped file.\n\n{table(header, lines)}"
    )
    print(write_result(f"data_{args.format}", "Large data", body))


if __name__ == "__main__":
    main()
