"""Memory and time of data of some gigabytes: tokenized, and read from the cache of an earlier run.

    python -m benchmarks.data [--megabytes 1000 2000 5000] [--format text] [--known]

Rows are those of GSM8K, shuffled and numbered, as chats or as texts of about 2,000 characters. Each measurement is a
process of its own: the dataset is loaded, its loader made, and the first micro-batch read. The memory is what the
process holds beyond its libraries: pages of the mapped file, which the system may drop, are not counted, and shown
beside it. The processes that tokenize are counted by the largest one, with the pages that it shares with the first.

With `--known`, the rows repeat KNOWN texts of about 8,000 characters, each of which the tokenizer reads once. All else
is the same: the rows are read, cut, written and mapped. So the memory is measured in minutes; with the tokenizer's own
work the first pass takes hours on a few cores.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.measure import anonymous_peak, run_child, table, write_result
from benchmarks.real import DATA, LENGTH, PACKAGE, make_model

TEXT_ROWS, KNOWN, KNOWN_ROWS = 4, 200, 16  # of GSM8K in a text; texts with --known, and their rows


def make_rows(path: Path, megabytes: int, format: str, known: bool) -> int:
    """Write a file of rows, and return their number."""
    rng, count = random.Random(0), 0
    rows = [json.loads(line) for line in (DATA / "train_300.jsonl").read_text(encoding="utf-8").splitlines()]

    def text_of(count: int) -> str:
        return "\n\n".join(f"{each['question']}\n{each['answer']}" for each in rng.choices(rows, k=count))

    texts = [text_of(KNOWN_ROWS) for _ in range(KNOWN)]
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < megabytes * 1e6:
            for _ in range(1000):
                count += 1
                if format == "text":
                    row = {"id": count, "text": rng.choice(texts) if known else f"{count}\n{text_of(TEXT_ROWS)}"}
                else:
                    some = rng.choice(rows)
                    row = {"question": f"({count}) {some['question']}", "answer": some["answer"]}
                file.write(json.dumps(row) + "\n")
    return count


class Known:
    """A tokenizer that keeps its results: the same text is tokenized once."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.results = tokenizer, {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __len__(self) -> int:
        return len(self.tokenizer)

    def __call__(self, text: str, **how: Any) -> Any:
        if (text, *how.items()) not in self.results:
            self.results[text, *how.items()] = self.tokenizer(text, **how)
        return self.results[text, *how.items()]


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its processes that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def child(args: argparse.Namespace) -> dict[str, Any]:
    from onecard.config import DataConfig
    from onecard.data.load import load_dataset
    from onecard.data.loader import Loader
    from onecard.hf.load import load_tokenizer

    tokenizer = load_tokenizer(str(make_model()))
    tokenizer = Known(tokenizer) if args.known else tokenizer
    with anonymous_peak() as peak:
        first, begin, cpu = peak[0], time.perf_counter(), cpu_seconds()
        config = DataConfig(max_seq_length=LENGTH, data_cache=args.cache)
        dataset = load_dataset(args.data, tokenizer, config)
        loader = Loader(dataset.examples, dataset.row_tokens, True, 1, 0)
        loader.next_batch()
        seconds = time.perf_counter() - begin
        mapped = psutil.Process().memory_info().shared
    return {
        "seconds": seconds,
        "cpu": cpu_seconds() - cpu,
        "worker": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        "cache": sum(file.stat().st_size for file in Path(args.cache).rglob("*") if file.is_file()),
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
    parser.add_argument("--known", action="store_true")
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
            rows = make_rows(path, megabytes, args.format, args.known)
            time.sleep(3)  # a file that was written just now is not kept
            for what in ("tokenized", "from the cache"):
                cache, which = f"{folder}/cache", ["--known"] * args.known
                found = run_child("benchmarks.data", "--child", "--data", str(path), "--cache", cache, *which)
                print(megabytes, what, json.dumps(found), flush=True)
                sizes = [f"{found[key] / 1e6:,.0f}" for key in ("memory", "mapped", "worker", "cache")]
                counts = [f"{count:,}" for count in (rows, found["examples"], found["tokens"])]
                times = [f"{found[key]:,.1f}" for key in ("seconds", "cpu")]
                lines.append([f"{megabytes:,}", *counts, what, *times, *sizes])
    kept = f", which reads each of {KNOWN} texts once" if args.known else ""
    header = ["MB of JSONL", "rows", "examples", "tokens", "", "seconds to the first micro-batch", "CPU seconds"]
    header += ["MB of memory", "MB mapped", "MB of the largest other process", "MB of cache"]
    body = (
        f"Rows of format {args.format}, tokenizer of SmolLM2 ({PACKAGE}){kept}; rows of {LENGTH} tokens. Memory is "
        f"what the process holds beyond its libraries, without the pages of the mapped file. CPU seconds are of all "
        f"processes.\n\n{table(header, lines)}"
    )
    print(write_result(f"data_{args.format}{'_known' * args.known}", "Large data", body))


if __name__ == "__main__":
    main()
