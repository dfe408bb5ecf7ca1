"""The README's chart: `python -m benchmarks.chart` draws docs/benchmarks.png from the numbers in benchmarks/results."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CPU, GPU = "train_1.1b_512_xeon_2026-11-26.md", "gpu_nvidia-h200_2026-11-26.md"
NAMES = ("onecard", "bitsandbytes + peft")


def number(text: str) -> float:
    return float(text.split()[0].replace(",", ""))


def cpu_column(index: int) -> list[float]:
    """Return a column of the side-by-side table: 2 is tokens a second, 4 is the peak in MB."""
    rows = [line.strip("| ").split(" | ") for line in (RESULTS / CPU).read_text(encoding="utf-8").splitlines()]
    found = {row[0]: row for row in rows if row[0] in NAMES}
    return [number(found[name][index]) for name in NAMES]


def gpu_speeds() -> list[float]:
    """Return tokens a second of the 1B shape with 512 tokens a step, both from one call."""
    text = (RESULTS / GPU).read_text(encoding="utf-8")
    ours, theirs = (
        re.search(r"([\d,]+) \(1b, 512\)", text),
        re.search(r"\| 1b \| 512 \| bnb \* \| no \| ([\d,]+)", text),
    )
    assert ours and theirs
    return [number(ours[1]), number(theirs[1])]


def panels() -> list[tuple[str, str, list[float]]]:
    """Return each panel's title, the unit of its numbers, and the numbers of NAMES."""
    return [
        ("training, 1.1B, two CPU cores", "tokens/s", cpu_column(2)),
        ("its peak memory", "MB", cpu_column(4)),
        ("training, 1B, H200", "tokens/s", gpu_speeds()),
    ]


def draw(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(11, 2.0), layout="constrained")
    for index, (axis, (title, unit, values)) in enumerate(zip(axes, panels())):
        bars = axis.barh(NAMES, values, color=["#1f4e8c", "#b8b8b8"])
        axis.bar_label(bars, [f"{value:,.0f} {unit}" for value in values], padding=4, fontsize=10)
        axis.set_xlim(0, 1.6 * max(values))
        axis.set_title(title, fontsize=11, loc="left")
        axis.invert_yaxis()
        axis.set_xticks([])
        axis.tick_params(axis="y", length=0)
        if index:
            axis.set_yticks([])
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    draw(ROOT / "docs" / "benchmarks.png")
    for title, unit, (ours, theirs) in panels():
        print(f"{title}: {ours:,.0f} {unit}, bitsandbytes + peft {theirs:,.0f}: {ours / theirs:.2f}x")
