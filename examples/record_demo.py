"""The picture of a run: `python examples/record_demo.py` draws the real output of `onecard demo` to docs/demo.svg."""

from __future__ import annotations

import re
import tempfile
from contextlib import chdir
from pathlib import Path

from rich.console import Console

from onecard.demo.run import run_demo
from onecard.terminal import finish, quiet_libraries
from onecard.train import progress

ROOT = Path(__file__).parents[1]


def main() -> None:
    quiet_libraries()
    progress.SECONDS_BETWEEN_LINES = float("inf")  # the first and the last step only
    console = Console(record=True, width=146, force_terminal=False, color_system="truecolor")
    console.print("[bold]$ onecard demo[/]")
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        finish(run_demo("demo-run", console), console)
    drawn = console.export_svg(title="onecard demo")
    drawn = drawn.replace(f"{ROOT}/", "")
    drawn = re.sub(r"@font-face \{.*?\}", "", drawn, flags=re.DOTALL)  # the picture fetches nothing
    (ROOT / "docs" / "demo.svg").write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    main()
