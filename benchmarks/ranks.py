"""Several processes on one CPU: memory of each against the plan, and the time of an update.

    python -m benchmarks.ranks --what memory [--shapes 1.1b 8b-4] [--counts 2 4]
    python -m benchmarks.ranks --what equality [--shapes dense experts dpo] [--counts 2 4]
    python -m benchmarks.ranks --what reads [--shapes 135m] [--counts 1 2 4]
    python -m benchmarks.ranks --what time [--shapes 135m] [--rounds 5]

Memory: each process trains two updates. Its peak of resident memory over what it had before loading is compared with
the plan.
Equality: small models in float32, 17 rows of different lengths in windows of 8 micro-batches, so that the last
window has one. Several processes are compared with one: the losses, the gradient of the first update, and the adapter.
Reads: each process loads its own copy of the checkpoint, sharded, with no page of it in memory, and no readahead. What
the disk gave is compared with its part of the 4-bit weights and all other tensors.
Time: two processes of one core each beside one process of two cores, in turn, each update with the same micro-batches.
Wall time and CPU time of an update are medians; the first update is left out.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import mmap
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file

from benchmarks.measure import MB, spread, table, write_result
from benchmarks.shapes import make_checkpoint
from onecard.config import TrainConfig, make_config
from onecard.hf import convert
from onecard.hf.checkpoint import inspect_checkpoint
from onecard.hf.convert import check_shape
from onecard.hf.load import load_model
from onecard.hf.skeleton import read_model
from onecard.torchrun import process_number
from onecard.train import loop
from onecard.train.ranks import join, leave
from onecard.train.session import run_training
from onecard.train.step import optimizer_step

TEXT = "the lazy dog counts 0123456789 blue mugs "
ALLOWED = 0.08
EXPERTS = {"target_parameters": ["gate_up_proj", "down_proj"]}
Tensors = dict[str, torch.Tensor]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {  # shape and settings of a row of the table of equality
    "dense": ("demo", {}),
    "experts": ("moe-tiny", EXPERTS),
    "dpo": ("demo", {"loss": "dpo"}),
}


def child(settings: dict[str, Any]) -> None:
    """Train as one of the processes, and print its memory, its reads and the seconds of its updates."""
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


def child_that_loads(settings: dict[str, Any]) -> None:
    """Load the base as one of the processes, from its own copy, and print the bytes that the disk gave."""
    ranks, copy = join("cpu"), Path(settings["model"] + f"-{process_number()}")
    shutil.copytree(settings["model"], copy)
    try:
        for path in copy.iterdir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        before, convert.check_shape = disk_bytes(), check_shape_without_readahead
        load_model(str(copy), compute_dtype="float32", device="cpu", sharded=ranks.count > 1)
        print(json.dumps({"read": disk_bytes() - before}))
    finally:
        shutil.rmtree(copy)
    leave(ranks)


def check_shape_without_readahead(*args: Any) -> None:
    """Check a weight's shape, before its values are read from the file that is mapped into memory."""
    for begin, end in convert.mapped_files():
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_RANDOM)
    check_shape(*args)


def disk_bytes() -> int:
    """Return the bytes that this process has caused to be read from disks."""
    return int(Path("/proc/self/io").read_text().split("\nread_bytes: ")[1].split()[0])


def run(shape: str, count: int, threads: int, settings: dict[str, Any], what: str = "train") -> list[dict[str, Any]]:
    """Train, or load, in `count` processes of `threads` threads. Return what each has printed."""
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
                [sys.executable, "-m", "benchmarks.ranks", "--child", what, json.dumps(fields)],
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


def equality(args: argparse.Namespace) -> None:
    """Compare the losses, the first gradient and the adapter of several processes with those of one."""
    settings = {
        "max_seq_length": 256, "sample_prompts": [], "compute_dtype": "float32", "lora_dropout": 0.0, "r": 8,
        "gradient_accumulation_steps": 8, "packing": False, "learning_rate": 2e-3, "save_steps": 1,
        "save_total_limit": 9,
    }  # fmt: skip
    rows = []
    for kind in args.shapes or KINDS:
        shape, more = KINDS[kind]
        with tempfile.TemporaryDirectory() as name:
            folder, found = Path(name), {}
            data = write_different(folder / "rows.jsonl", kind == "dpo")
            for count, parallel in ((1, "ddp"), *((n, how) for n in args.counts for how in ("ddp", "fsdp"))):
                output = folder / f"{count}-{parallel}"
                own = {"parallel": parallel, "data": str(data), "output": str(output)}
                run(shape, count, 1, {**settings, **more, **own})
                found[count, parallel] = losses, gradient, adapter, digest = read_run(output)
                one, ddp = found[1, "ddp"], found[count, "ddp"]
                apart = max(abs(a - b) / abs(b) for a, b in zip(losses, one[0], strict=True))
                cells = [f"{losses[0]:.6f}, {losses[-1]:.6f}", f"{apart:.1e}", f"{distance(gradient, one[1]):.1e}"]
                cells += [f"{distance(adapter, one[2]):.1e}", "yes" if digest == ddp[3] else "no"]
                rows.append([kind, str(count), parallel, *cells])
                print(" | ".join(rows[-1]), flush=True)
    header = [
        "what",
        "processes",
        "parallel",
        "first and last loss",
        "losses",
        "first gradient",
        "adapter",
        "ddp's bytes",
    ]
    print(write_result("ranks_equality", "The updates of several processes, against those of one", table(header, rows)))


def write_different(path: Path, in_pairs: bool) -> Path:
    """Write 17 rows of different lengths: texts, or pairs of answers."""
    rows = []
    for i in range(17):
        text = TEXT * (1 + i % 5)
        pair = {"prompt": f"how many {i}?", "chosen": text, "rejected": TEXT[::-1] * (1 + i % 3)}
        rows.append(pair if in_pairs else {"text": f"{i} {text}"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_run(output: Path) -> tuple[list[float], Tensors, Tensors, str]:
    """Return a run's losses, AdamW's mean of gradients after the first update, the adapter, and the adapter's hash."""
    losses = [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    states = load_file(output / "checkpoints" / "checkpoint-1" / "optimizer.safetensors")
    gradient = {name: tensor for name, tensor in states.items() if name.endswith(".exp_avg")}
    path = output / "adapter" / "adapter_model.safetensors"
    return losses, gradient, load_file(path), hashlib.sha256(path.read_bytes()).hexdigest()


def distance(one: Tensors, other: Tensors) -> float:
    """Return the norm of the difference of all tensors over the norm of the other ones."""
    assert one.keys() == other.keys()
    apart = sum(float((one[name].double() - other[name].double()).square().sum()) for name in one)
    return (apart / sum(float(tensor.double().square().sum()) for tensor in other.values())) ** 0.5


def reads(args: argparse.Namespace) -> None:
    """Compare what each process reads from its copy of the checkpoint with its part."""
    rows = []
    for shape in args.shapes or ["135m"]:
        checkpoint = inspect_checkpoint(make_checkpoint(shape))
        quantized = set(read_model(checkpoint).quantized)
        sizes = {name: info.nbytes for name, info in checkpoint.tensors.items()}
        in_4_bits = sum(size for name, size in sizes.items() if name in quantized)
        for count in args.counts:
            part = in_4_bits / count + sum(sizes.values()) - in_4_bits
            for number, found in enumerate(run(shape, count, 1, {}, "load")):
                cells = [f"{size / MB:,.1f}" for size in (sum(sizes.values()), part, found["read"])]
                rows.append([shape, f"{number} of {count}", *cells])
                print(" | ".join(rows[-1]), flush=True)
    header = ["shape", "process", "checkpoint, MB", "own part, MB", "read, MB"]
    print(write_result("ranks_reads", "What each process reads while a sharded base loads", table(header, rows)))


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
    parser.add_argument("--child", nargs=2)
    parser.add_argument("--what", choices=["memory", "equality", "reads", "time"], default="memory")
    parser.add_argument("--shapes", nargs="+")
    parser.add_argument("--counts", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--parallel", nargs="+", default=["ddp", "fsdp"])
    parser.add_argument("--terms", action="store_true", help="print the plan's terms")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--length", type=int, default=512, help="tokens of a row, for the time")
    args = parser.parse_args()
    if args.child:
        {"train": child, "load": child_that_loads}[args.child[0]](json.loads(args.child[1]))
    else:
        {"memory": memory, "equality": equality, "reads": reads, "time": timing}[args.what](args)


if __name__ == "__main__":
    main()
