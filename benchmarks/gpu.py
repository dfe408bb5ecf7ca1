"""All tests and benchmarks of a GPU in one call under ten minutes: python -m benchmarks.gpu [--sections kernels steps]

    kernels   each kernel in a CUDA graph beside a copy, torch's product and bitsandbytes (gpu_kernels.py)
    steps     whole updates on 1B- and 8B-shaped random weights: onecard with CUDA graphs and without, bitsandbytes +
              peft, LoRA on a 16-bit base with peft and with onecard; and tokens generated a second (gpu_steps.py)
    unsloth   the same rows with Unsloth, where it is installed (gpu_unsloth.py)
    memory    what fits under enforced caps: 7B in 6 GB, 8B with 100,000 tokens in 24 GB, 123B in 24 GB (gpu_memory.py)
    tests     the suite's GPU tests

Each shape and contender, each case and each section is a process of its own. Its results are written as it gives them,
so that an error, or the end of the time, loses nothing that was measured before. A part that has not begun after
--minutes does not run, and one that runs is stopped at --most; the result says so. The processes start and import at
the beginning, and use the GPU only after the parent sends a line.

Results go to results/gpu_<device>_<date>.json and .md. --dry-run checks the script on the CPU with a tiny shape.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_kernels, gpu_steps, gpu_unsloth
from benchmarks.gpu_steps import CONTENDERS, NEW_TOKENS, ROWS, SHAPES, Row, row_result
from benchmarks.measure import RESULTS, table

SECTIONS = ("kernels", "steps", "unsloth", "memory", "tests")
CASES = ("7b", "8b-context", "123b")
GPU_TESTS = [
    f"tests/{name}.py"
    for name in ("kernels/test_triton", "train/test_gpu", "nn/test_experts", "nn/test_slabs", "infer/test_graphs")
]
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12, "3090": 71e12}  # dense bfloat16


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sections", nargs="*", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--rows", type=Row.parse, nargs="*", default=ROWS, help="as 2048, 2048x8 or 8192x16r")
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=["1b", "8b"])
    parser.add_argument("--contenders", nargs="*", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES), help="of gpu_memory.py")
    parser.add_argument("--minutes", type=float, default=8.5, help="after which nothing new begins")
    parser.add_argument("--most", type=float, default=9.6, help="minutes after which what still runs is stopped")
    parser.add_argument("--dry-run", action="store_true", help="the CPU and a tiny shape; nothing is written")
    parser.add_argument("--child", nargs="*", help="SECTION [SHAPE [CONTENDER]]")
    args = parser.parse_args(arguments)
    if args.dry_run:
        args.shapes, args.rows = ["tiny"], [Row(64), Row(96, 3, True)]
    return args


def main() -> None:
    args = parse()
    device = torch.device("cuda" if torch.cuda.is_available() and not args.dry_run else "cpu")
    if args.child:
        if args.child[0] == "steps":
            gpu_steps.import_libraries(args.child[2])
        if not sys.stdin.isatty():
            sys.stdin.readline()  # wait until the parent releases the GPU
        for name, found in child(args, device):
            print(json.dumps({"name": name, **found}), flush=True)
        return
    if device.type == "cpu" and not args.dry_run:
        sys.exit("no GPU here; --dry-run checks the script")
    for found in measure_all(args, device):
        if not args.dry_run:
            write(found)


def child(args: argparse.Namespace, device: torch.device) -> Iterable[tuple[str, dict[str, Any]]]:
    """Yield the results of one process."""
    section, *rest = args.child
    if section == "kernels":
        timer = gpu_kernels.Timer(device)
        yield "copy", {"copy_speed": timer.copy_speed}
        for N, K in [(256, 128)] if args.dry_run else [(5632, 2048), (14336, 4096)]:
            for row in gpu_kernels.of_shape(timer, N, K):
                yield row["kernel"], row
    elif section == "steps":
        shape, contender = rest
        yield from gpu_steps.child(shape, contender, args.rows, device)
    elif section == "unsloth":
        yield from gpu_unsloth.child(rest[0], args.rows, device)


def measure_all(args: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield the results so far after each one."""
    begin = time.monotonic()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    flops = next((value for key, value in PEAK_FLOPS.items() if key in name), None)
    found: dict[str, Any] = {"device": name, "torch": torch.__version__, "tests": None}
    found |= {"kernels": [], "steps": [], "generate": [], "memory": []}
    waiting = [(job, start(command(args, job))) for job in jobs(args)]
    try:
        for job, running in waiting:
            for result in results(running, begin + 60 * args.minutes, begin + 60 * args.most):
                print(job, json.dumps(result)[:300], flush=True)
                add(found, job, result, flops)
                yield found
    finally:
        for _, running in waiting:
            running.kill()


def jobs(args: argparse.Namespace) -> list[tuple[str, ...]]:
    """Return the processes in their order: section, then shape and contender, or case."""
    found: list[tuple[str, ...]] = []
    for section in SECTIONS:
        if section not in args.sections:
            continue
        if section == "steps":
            pairs = sorted(args.contenders, key=CONTENDERS.index)
            found += [(section, shape, contender) for contender in pairs for shape in args.shapes]
        elif section == "unsloth":
            found += [(section, args.shapes[-1])]
        elif section == "memory":
            found += [(section, case) for case in args.cases]
        elif section == "kernels" or not args.dry_run:
            found += [(section,)]
    return found


def command(args: argparse.Namespace, job: tuple[str, ...]) -> list[str]:
    dry = ["--dry-run"] if args.dry_run else []
    section, *rest = job
    if section == "memory":
        return ["-m", "benchmarks.gpu_memory", *dry, "--case", *rest]
    if section == "tests":
        together = ["-n", "auto"] if find_spec("xdist") else []
        return ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *together, *GPU_TESTS]
    rows = ["--rows", *map(str, args.rows)]
    return ["-m", "benchmarks.gpu", *dry, *rows, "--child", *job]


def start(arguments: list[str]) -> subprocess.Popen:
    """Start a process that waits for a line before it uses the GPU."""
    if "pytest" in arguments:  # it would not wait
        wait = (
            f"import sys, runpy; input(); sys.argv = {arguments[1:]!r}; runpy.run_module('pytest', run_name='__main__')"
        )
        arguments = ["-c", wait]
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *arguments], stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def results(running: subprocess.Popen, deadline: float, last: float) -> Iterator[dict[str, Any]]:
    """Release a process and yield its results as it prints them; at its end, why it failed if it did."""
    assert running.stdin is not None and running.stdout is not None
    if time.monotonic() > deadline:
        yield {"failed": "not run: the time was over"}
        return
    stopper = threading.Timer(max(last - time.monotonic(), 1), running.kill)
    stopper.start()
    try:
        with suppress(BrokenPipeError), running.stdin as pipe:
            pipe.write("go\n")
        words = "no output"
        for line in running.stdout:
            if line.startswith("{"):
                yield json.loads(line)
            elif line.strip():
                words = line.strip()
        code = running.wait()
        if re.search(r"\d (passed|failed|skipped)", words):
            yield {"tests": words.strip("= ")}
        elif code:
            yield {"failed": "stopped: the time was over" if time.monotonic() >= last else words[:200]}
    finally:
        stopper.cancel()


def add(found: dict[str, Any], job: tuple[str, ...], result: dict[str, Any], flops: float | None) -> None:
    """Put a result where it belongs."""
    section, *rest = job
    if section == "tests":
        found["tests"] = result.get("tests") or result["failed"]
    elif section == "memory":
        found["memory"].append({"case": rest[0], **result})
    elif section == "kernels":
        found["kernels"].append({"kernel": "all", **result} if "failed" in result else result)
    elif result.get("name") == "generate":
        rate = {"tok_s": NEW_TOKENS / result["seconds"]} if "seconds" in result else {"failed": result["failed"]}
        found["generate"].append({"shape": rest[0], "contender": rest[1], **rate})
    else:
        contender = rest[1] if section == "steps" else f"unsloth {result.pop('mode', '')}".strip()
        name = result.pop("name", "all")
        row = {"shape": rest[0], "row": name, **result} if "failed" in result else row_result(
            rest[0], Row.parse(name), result, flops
        )  # fmt: skip
        found["steps"].append({"contender": contender, **row})


def write(found: dict[str, Any]) -> Path:
    """Write the JSON and the Markdown. Return the Markdown's path."""
    stem = re.sub(r"\W+", "-", found["device"].lower())
    path = RESULTS / f"gpu_{stem}_{time.strftime('%Y-%m-%d')}"
    path.parent.mkdir(exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(found))
    return path.with_suffix(".md")


def markdown(found: dict[str, Any]) -> str:
    """Format four tables: kernels, steps, generation, memory."""
    lines = [f"# {found['device']}", f"torch {found['torch']}; GPU tests: {found['tests']}"]
    cells = []
    for r in found["kernels"]:
        if "us" in r:
            alone = "" if r["in_graph"] else "by itself, with the host"
            cells.append([r["kernel"], f"{r['us']:.1f}", f"{r['of_floor']:.0%}", alone])
        else:
            speed = f"{r['copy_speed'] / 1e9:,.0f} GB/s" if "copy_speed" in r else r["failed"]
            cells.append(["a large copy" if "copy_speed" in r else r["kernel"], speed, "", ""])
    lines += [table(["kernel", "us in a CUDA graph, caches cold", "of its floor", ""], cells)]
    cells = []
    for r in found["steps"]:
        numbers = [r["failed"], "", "", ""] if "failed" in r else [
            f"{r['tok_s']:,.0f}" + (f" (no graphs: {r['refused']})" if "refused" in r else ""),
            f"{r['reserved_gb']:.1f}", *(f"{r[key]:.0%}" if r[key] is not None else "" for key in ("mfu", "busy")),
        ]  # fmt: skip
        cells.append([r["shape"], *row_words(r["row"]), r["contender"], *numbers])
    header = ["shape", "tokens", "documents", "recompute", "", "tok/s", "GB reserved", "MFU", "GPU busy"]
    lines += [table(header, cells)]
    rates = [[r["shape"], r["contender"], r.get("failed") or f"{r['tok_s']:.1f}"] for r in found["generate"]]
    lines += [table(["shape", "generate", "tok/s"], rates)]
    lines += [table(["case", "found"], [[r["case"], r.get("failed") or r["found"]] for r in found["memory"]])]
    return "\n\n".join(lines) + "\n"


def row_words(name: str) -> list[str]:
    if name == "all":
        return ["all", "", ""]
    row = Row.parse(name)
    return [f"{row.tokens:,}", str(row.documents), "yes" if row.recompute else "no"]


if __name__ == "__main__":
    main()
