"""Code of the pages that users copy, in one namespace, in a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def fenced(page: str, language: str) -> list[str]:
    """The blocks of a Markdown page that are in a language."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def cells(notebook: str) -> list[str]:
    """The code of a notebook."""
    found = json.loads((ROOT / notebook).read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in found["cells"] if cell["cell_type"] == "code"]


def run(blocks: list[str], folder: Path) -> str:
    """What the blocks print, one after the other in `folder`. Their script stays there."""
    script = folder / "snippet.py"
    script.write_text("\n\n".join(blocks), encoding="utf-8")
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, script.name], cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True,
        text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
