"""Every command that writes, with the n-th call of the system failing, all in one process; the last line is a JSON
object of counts and of what went wrong: `LD_PRELOAD=shim.so python -m tests.faults.driver FOLDER EACH`."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from onecard.config import GgufConfig, QuantConfig, TrainConfig, make_config
from onecard.errors import UserError
from onecard.export.gguf.writer import export_gguf
from onecard.export.merge.merged import merge
from onecard.export.merge.quantized import quantize_checkpoint
from onecard.infer.chat import append_line
from onecard.memory.figures import plot_plan
from onecard.memory.plan import plan
from onecard.train.checkpoint import load_newest
from onecard.train.session import run_training
from tests.conftest import chat_rows, make_checkpoint, write_rows

ERRNOS = [getattr(errno, name) for name in "EIO ESTALE EMFILE ENOMEM ENOSPC EROFS EDQUOT EACCES".split()]
MOST_SECONDS = 10.0


class Hung(BaseException):
    pass


class Cases:
    """What each command writes, from where it starts, and what must hold after a fault."""

    def __init__(self, root: Path):
        self.root, self.out = root, root / "out"
        self.base = str(make_checkpoint(root / "base"))
        self.data = str(write_rows(root / "d.jsonl", chat_rows(12)))
        self.plan = plan("llama-2-7b", device_memory_bytes=6 * 10**9)
        self.train(root / "whole", 3)
        self.adapter = str(root / "whole" / "adapter")
        self.expected = (root / "whole" / "adapter" / "adapter_model.safetensors").read_bytes()

    def train(self, output: Path, steps: int, resuming: bool = False) -> None:
        fields = {
            "model": self.base, "data": self.data, "output": str(output), "device": "cpu", "compute_dtype": "float32",
            "max_seq_length": 64, "gradient_accumulation_steps": 1, "r": 2, "save_steps": 1, "max_steps": steps,
            "sample_prompts": [], "save_total_limit": 2,
        }  # fmt: skip
        run_training(make_config(TrainConfig, fields), resuming, Console(quiet=True))

    def begin(self, name: str) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()
        if name == "resume":  # as it was after two of three steps
            shutil.copytree(self.root / "whole", self.out / "run")
            shutil.rmtree(self.out / "run" / "adapter")
            shutil.rmtree(self.out / "run" / "checkpoints" / "checkpoint-3")
        if name == "chat":
            (self.out / "talk.jsonl").write_text('{"messages": []}\n')

    def run(self, name: str) -> None:
        out = str(self.out / "result")
        if name == "train":
            self.train(self.out / "run", 2)
        elif name == "resume":
            self.train(self.out / "run", 3, True)
        elif name == "merge":
            merge(self.base, self.adapter, out)
        elif name == "quantize":
            quantize_checkpoint(self.base, out, QuantConfig())
        elif name == "gguf":
            export_gguf(self.base, self.adapter, out + ".gguf", GgufConfig())
        elif name == "plan":
            plot_plan(out + ".png", self.plan, "a plan")
        elif name == "chat":
            try:
                append_line(self.out / "talk.jsonl", {"messages": [{"role": "user", "content": "é" * 9}]})
            except OSError as error:  # Talk.save's
                raise UserError("the file must be writable", str(error), "choose another", "talk.jsonl") from None

    def check(self, name: str, failed: bool, sticky: bool) -> str | None:
        """What is lost or left over, if anything."""
        if name == "resume":
            found = load_newest(self.out / "run" / "checkpoints")
            if found is None or found.step < 2:
                return "the earlier checkpoint is lost"
        if name == "train":
            load_newest(self.out / "run" / "checkpoints")
        if name in ("merge", "quantize") and failed and (self.out / "result").exists():
            shutil.copytree(self.out / "result", self.out / "again")
            self.out = self.root / "fresh"
            try:
                self.begin(name)
                self.run(name)
                whole = {p.name: p.read_bytes() for p in (self.out / "result").iterdir()}
            finally:
                self.out = self.root / "out"
            if {p.name: p.read_bytes() for p in (self.out / "again").iterdir()} != whole:
                return "a result is there that is not whole"
        lines = (self.out / "talk.jsonl").read_text().splitlines() if name == "chat" else []
        if name == "chat" and not sticky and len(lines) != (1 if failed else 2) and not self.closed_late(lines):
            return f"the talk has {len(lines)} lines"
        return None

    @staticmethod
    def closed_late(lines: list[str]) -> bool:
        """The last call failed, the close: the row is whole."""
        return len(lines) == 2 and all(json.loads(line) for line in lines)


NAMES = ("train", "resume", "merge", "quantize", "gguf", "plan", "chat")


def cases(shim: Any, made: Cases, each: int) -> Iterator[tuple[str, int, int, bool]]:
    """(command, call, errno, sticky): all of them, or every `each`-th with the errnos in turn."""
    number = 0
    for name in NAMES:
        made.begin(name)
        shim.shim_arm(os.fsencode(made.out), 0, 0, 0)
        made.run(name)
        total = shim.shim_count()
        shim.shim_arm(b"", 0, 0, 0)
        assert total > 1, f"{name}: {total} calls, so the shim does not see them"
        print(f"{name}: {total} calls", file=sys.stderr, flush=True)
        step = each if total > 12 else 1
        for call in range(1, total + 1, step):
            for sticky in (False, True) if each == 1 else (number % 2 == 1,):
                for code in ERRNOS if each == 1 and total < 200 else [ERRNOS[number % len(ERRNOS)]]:
                    number += 1
                    yield name, call, code, sticky


def one(act: Callable[[], None]) -> tuple[str, str]:
    """How a command ends, and its words."""

    def hung(*_: Any) -> None:
        raise Hung

    signal.signal(signal.SIGPROF, hung)
    signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)  # of CPU time: the machine may be busy
    start = time.monotonic()
    try:
        act()
        kind, words = "success", ""
    except UserError as error:
        kind, words = "error", str(error)
    except Hung:
        kind, words = "hang", traceback.format_exc()[-3000:]
    except BaseException:
        kind, words = "traceback", traceback.format_exc()[-3000:]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if time.monotonic() - start > 6 * MOST_SECONDS:
        kind = "hang"
    return kind, words


def main(folder: str, each: int) -> None:
    shim = ctypes.CDLL(None)
    shim.shim_arm.argtypes = (ctypes.c_char_p, ctypes.c_int, ctypes.c_long, ctypes.c_int)
    shim.shim_count.restype = ctypes.c_long
    made = Cases(Path(folder))
    counts, wrong = Counter(), []
    for name, call, code, sticky in cases(shim, made, each):
        made.begin(name)
        shim.shim_arm(os.fsencode(made.out), code, call, int(sticky))
        try:
            kind, words = one(lambda name=name: made.run(name))
        finally:
            shim.shim_arm(b"", 0, 0, 0)
        counts[f"{name} {kind}"] += 1
        counts[f"{errno.errorcode[code]} {kind}"] += 1
        case = f"{name}, call {call}, {errno.errorcode[code]}{', sticky' if sticky else ''}"
        reason = os.strerror(code)
        if kind in ("traceback", "hang") or (kind == "error" and reason not in words and "readable" not in words):
            wrong.append(f"{case}: {kind}\n{words}")
        elif (lost := made.check(name, kind == "error", sticky)) is not None:
            wrong.append(f"{case}: {lost}\n{words}")
    print(json.dumps({"counts": counts, "wrong": wrong}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
