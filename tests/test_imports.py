"""Exact: a room imports only from rooms above it, and heavy libraries stay out of the command line's start."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "onecard"
ORDER = [
    "callable",
    "errors",
    "faults",
    "files",
    "documents",
    "patterns",
    "torchrun",
    "config",
    "recipes",
    "quant",
    "kernels",
    "nn",
    "paging",
    "hf",
    "optim",
    "data",
    "adapter",
    "memory",
    "infer",
    "train",
    "export",
    "demo",
    "terminal",
    "api",
    "studio",
    "cli",
]


def imported_rooms(path: Path) -> set[str]:
    """The rooms of onecard that a file imports, anywhere in it."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom) and node.module:
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "onecard" else [node.module]
            )
        rooms |= {name.split(".")[1] for name in names if name.startswith("onecard.")}
    return rooms


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_imports_go_one_way():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        room = room_of(path)
        if room in ("__init__", "__main__"):
            continue
        assert room in ORDER, f"{path} is in a room that has no place in the order"
        wrong += [
            f"{path.relative_to(PACKAGE)} imports {other}"
            for other in imported_rooms(path)
            if ORDER.index(other) > ORDER.index(room)
        ]
    assert not wrong, wrong


def test_no_file_is_long_and_none_is_called_utils():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path
        assert path.name != "utils.py"


def test_the_command_line_starts_without_heavy_libraries():
    code = "import sys, onecard.cli; print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_nothing_runs_code_from_files():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec"), path
        for banned in ("import pickle", "torch.load(", "trust_remote_code=True"):
            assert banned not in text, (path, banned)
