"""Several processes on one CPU: memory of each against the plan, and the time of an update.

    python -m benchmarks.ranks --what memory [--shapes 1.1b 8b-4] [--counts 2 4]
    python -m benchmarks.ranks --what time [--shapes 135m] [--rounds 5]

Memory: each process trains two updates. Its peak of resident memory over what it had before loading is compared with
the plan.
Time: two processes of one core each beside one process of two cores, in turn, each update with the same micro-batches.
Wall time and CPU time of an update are medians; the first update is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.measure import MB, spread, table, write_result
from benchmarks.shapes import make_checkpoint
from onecard.config import TrainConfig, make_config
from onecard.train import loop
from onecard.train.session import run_training
from onecard.train.step import optimizer_step

TEXT = "the lazy dog counts 0123456789 blue mugs "
ALLOWED = 0.08


def child(settings: dict[str, Any]) -> None:
    """Train as one of the processes, and print its memory, its reads and the seconds of its updates."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    seconds: list[tuple[float, float]] = []

    def timed(run: Any) -> dict[str, Any]:
        wall, cpu = time.perf_counter(), time.process_time()
        row = optimizer_step(run)
        seconds.append((time.perf_counter() - wall, time.process_time() - cpu))
        return row

    loop.optimizer_step = timed
    result = run_training(make_config(TrainConfig, settings), False, Console(file=StringIO()))
    memory = dict(result.report.memory)
    print(
        json.dumps(
            {
                "planned": memory["plan: total"],
                "terms": [(name, size) for name, size in result.report.memory if name.startswith("plan: ")],
                "measured": memory["measured: peak beside the process"],
                "seconds": seconds,
            }
        )
    )


def run(shape: str, count: int, threads: int, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Train in `count` processes of `threads` threads. Return what each has printed."""
    model = make_checkpoint(shape)
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        rows = Path(folder) / "rows.jsonl"
        rows.write_text("".join(json.dumps({"text": TEXT * 60}) + "\n" for _ in range(64)))
        free.bind(("127.0.0.1", 0))
        same = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": free.getsockname()[1], "OMP_NUM_THREADS": threads}  # fmt: skip
        free.close()
        fields = {"model": str(model), "data": str(rows), "output": f"{folder}/o", "device": "cpu", **settings}
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.ranks", "--child", json.dumps(fields)],
                env={**os.environ, **{k: str(v) for k, v in {**same, "RANK": n, "LOCAL_RANK": n}.items()}},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for n in range(count)
        ]
        ends = [process.communicate() for process in processes]
    for process, (_, err) in zip(processes, ends):
        if process.returncode:
            raise RuntimeError(err[-3000:])
    return [json.loads(out.splitlines()[-1]) for out, _ in ends]


def memory(args: argparse.Namespace) -> None:
    settings = {"max_seq_length": 256, "gradient_checkpointing": True, "max_steps": 2, "sample_prompts": [],
                "compute_dtype": "bfloat16"}  # fmt: skip
    rows = []
    for shape in args.shapes or ["1.1b", "8b-4"]:
        for count in args.counts:
            for parallel in args.parallel:
                more = {"parallel": parallel, "gradient_accumulation_steps": count}
                for number, found in enumerate(run(shape, count, 1, {**settings, **more})):
                    sizes, error = (found["planned"], found["measured"]), found["planned"] / found["measured"] - 1
                    cells = [f"{number} of {count}", *(f"{size / MB:,.0f}" for size in sizes), f"{error:+.1%}"]
                    rows.append([shape, parallel, *cells, "yes" if abs(error) <= ALLOWED else "no"])
                    print(" | ".join(rows[-1]), flush=True)
                    if args.terms:
                        print(*(f"    {name} {size / MB:,.1f}" for name, size in found["terms"]), sep="\n", flush=True)
    header = ["shape", "parallel", "process", "plan, MB", "measured, MB", "error", "within 8 %"]
    print(write_result("ranks_memory", "Memory of each of several processes, against the plan", table(header, rows)))


def timing(args: argparse.Namespace) -> None:
    settings = {
        "max_seq_length": args.length, "max_steps": args.updates, "sample_prompts": [], "compute_dtype": "bfloat16",
        "gradient_accumulation_steps": 4, "per_device_train_batch_size": 1,
    }  # fmt: skip
    rows = []
    for shape in args.shapes or ["135m"]:
        found: dict[int, list[list[float]]] = {1: [], 2: []}
        for _ in range(args.rounds):
            for count in found:
                processes = run(shape, count, 2 // count, settings)
                for updates in zip(*(process["seconds"][1:] for process in processes)):
                    found[count].append([max(wall for wall, _ in updates), sum(cpu for _, cpu in updates)])
                print(shape, count, found[count][-1], flush=True)
        (wall_1, cpu_1), (wall_2, cpu_2) = (zip(*found[count]) for count in (1, 2))
        for name, one, two in (("wall", wall_1, wall_2), ("CPU", cpu_1, cpu_2)):
            ratio = statistics.median(two) / statistics.median(one)
            rows.append([shape, name, spread(list(one)), spread(list(two)), f"{ratio:.2f}"])
    header = ["shape", "seconds an update", "1 process, 2 cores", "2 processes, 1 core each", "ratio of medians"]
    print(write_result("ranks_time", "An update in two processes, against one", table(header, rows)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--child")
    parser.add_argument("--what", choices=["memory", "time"], default="memory")
    parser.add_argument("--shapes", nargs="+")
    parser.add_argument("--counts", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--parallel", nargs="+", default=["ddp", "fsdp"])
    parser.add_argument("--terms", action="store_true", help="print the plan's terms")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--length", type=int, default=512, help="tokens of a row, for the time")
    args = parser.parse_args()
    if args.child:
        child(json.loads(args.child))
    elif args.what == "memory":
        memory(args)
    else:
        timing(args)


if __name__ == "__main__":
    main()
