"""Speed next to other busy processes: onecard and bitsandbytes + peft in turn, training, generating, serving.

    python -m benchmarks.contention [--shape 135m] [--works train generate serve] [--seconds 8] [--rounds 3]

Every contender is a process of its own. After a warm-up, its speed is measured alone and next to loops that never wait.
The loops are children of that process and end with it. The share kept is the speed next to them over the speed alone in
the same process. No other work may run on the machine, except at a far lower priority: run this with `nice -n -20`. A
value of GOMP_SPINCOUNT or OMP_WAIT_POLICY that you set applies to all contenders.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from urllib.request import Request, urlopen

import torch

from benchmarks import train
from benchmarks.load import load
from benchmarks.measure import run_child, table, write_result
from benchmarks.shapes import SHAPES, make_checkpoint

CONTENDERS = {"onecard": "onecard", "bnb": "bitsandbytes + peft"}
WORKS = ("train", "generate", "serve")
COUNT = 16  # tokens of an answer
LOOP = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    for _ in range(10**6): pass"


@contextmanager
def busy_loops(count: int) -> Iterator[None]:
    loops = [subprocess.Popen([sys.executable, "-c", LOOP]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def training(args: argparse.Namespace, stack: ExitStack) -> Callable[[], int]:
    """Return a function that runs one training step and returns its number of tokens."""
    folder = make_checkpoint(args.shape)
    settings = argparse.Namespace(child=args.child, shape=args.shape, length=args.length, steps=2000, recompute=False)
    base = (train.load_onecard if args.child == "onecard" else train.load_peer)(settings, folder)
    steps = train.steps(settings, folder, base)

    def step() -> int:
        next(steps)
        return args.length

    return step


def generating(args: argparse.Namespace, stack: ExitStack) -> Callable[[], int]:
    """Return a function that generates COUNT tokens greedily and returns COUNT."""
    model = load(args.child, str(make_checkpoint(args.shape))).eval()
    prompt = torch.arange(100, 132)[None]
    fixed = {"min_new_tokens": COUNT, "max_new_tokens": COUNT, "do_sample": False, "pad_token_id": 0}
    if args.child == "onecard":
        from onecard.kernels.cpu.contention import sharing_cores

        stack.enter_context(sharing_cores())  # as `onecard generate` does

    def write() -> int:
        model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **fixed)
        return COUNT

    return write


def serving(args: argparse.Namespace, stack: ExitStack) -> Callable[[], int]:
    """Return a function that requests COUNT tokens from `onecard serve` and returns how many it got."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["serve", "--model", str(make_checkpoint(args.shape)), "--port", str(port), "--device", "cpu"]
    server = subprocess.Popen([sys.executable, "-m", "onecard.cli", *command], stdout=subprocess.DEVNULL)
    stack.callback(server.wait)
    stack.callback(server.terminate)
    wanted = {"prompt": "a b c d e f g h", "max_tokens": COUNT, "temperature": 0, "model": "x"}

    def ask() -> int:
        url = f"http://127.0.0.1:{port}/v1"
        with urlopen(f"{url}/models", timeout=60) as answer:
            wanted["model"] = json.load(answer)["data"][0]["id"]
        head = {"Content-Type": "application/json"}
        with urlopen(Request(f"{url}/completions", json.dumps(wanted).encode(), head), timeout=300) as answer:
            return json.load(answer)["usage"]["completion_tokens"]

    for _ in range(120):
        try:
            ask()
            return ask
        except OSError:
            assert server.poll() is None, "the server has ended"
            time.sleep(1)
    raise RuntimeError("the server did not start in two minutes")


def measure(call: Callable[[], int], seconds: float) -> float:
    """Return tokens a second over at least `seconds` and one call."""
    begin, tokens = time.perf_counter(), call()
    while time.perf_counter() - begin < seconds:
        tokens += call()
    return tokens / (time.perf_counter() - begin)


def child(args: argparse.Namespace) -> None:
    found = {}
    with ExitStack() as stack:
        call = {"train": training, "generate": generating, "serve": serving}[args.works[0]](args, stack)
        measure(call, 1)
        for count in args.loops:
            with busy_loops(count):
                measure(call, 1)  # the loops start, and the contender adapts to them
                found[count] = measure(call, args.seconds)
            measure(call, 2)  # the contender adapts to their end
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--works", nargs="*", choices=WORKS, default=list(WORKS))
    parser.add_argument("--loops", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", choices=CONTENDERS)
    args = parser.parse_args()
    if args.child:
        return child(args)
    assert args.loops[0] == 0, "what is kept is a share of the speed alone"
    make_checkpoint(args.shape)
    runs: dict[tuple[str, str], list[dict[str, float]]] = {}
    common = ["--shape", args.shape, "--length", str(args.length), "--seconds", str(args.seconds)]
    common += ["--loops", *map(str, args.loops)]
    for number in range(args.rounds):
        for work in args.works:
            for name in CONTENDERS:
                if work == "serve" and name == "bnb":
                    continue  # it has no server
                found = run_child("benchmarks.contention", "--child", name, "--works", work, *common)
                runs.setdefault((work, name), []).append(found)
                print(f"round {number + 1}  {work:8s} {name:8s} {found}", flush=True)
    print(write_result(f"contention_{args.shape}_epyc", "Beside busy processes", report(args, runs)))


def report(args: argparse.Namespace, runs: dict[tuple[str, str], list[dict[str, float]]]) -> str:
    loops = [str(count) for count in args.loops]
    lines = []
    for (work, name), found in runs.items():
        cells = []
        for count in loops:
            speeds = [run[count] for run in found]
            kept = statistics.median(run[count] / run["0"] for run in found)
            share = "" if count == "0" else f", {kept:.0%}"
            cells.append(f"{statistics.median(speeds):,.4g} ({min(speeds):,.4g} to {max(speeds):,.4g}){share}")
        lines.append([work, CONTENDERS[name], *cells])
    setting = ", ".join(f"{n}={os.environ[n]}" for n in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY") if n in os.environ)
    return (
        f"{args.shape} Llama shape, bfloat16; training rows of {args.length} tokens, answers of {COUNT} tokens. Tokens "
        f"a second: median (least to most) of {args.rounds} processes, and what is kept of the speed alone in the same "
        f"process. {setting or 'No variable of OpenMP is set.'}\n\n"
        + table(["work", "", *(f"{count} busy loops" for count in loops)], lines)
    )


if __name__ == "__main__":
    main()
