"""A run's report: loss_curve.png, report.md, report.html. `onecard report` makes them again from report.json."""

from __future__ import annotations

import base64
import json
import platform
import re
from dataclasses import asdict, dataclass, field
from html import escape
from importlib.metadata import PackageNotFoundError, version
from math import ceil, exp, isfinite
from pathlib import Path
from typing import Any

from onecard.faults import about
from onecard.memory.measure import format_bytes
from onecard.train.curves import smooth
from onecard.train.metrics import replace_text
from onecard.train.record import STORED

VALIDATION_COLOURS = ("#c2410c", "#7c3aed", "#0f766e", "#a16207", "#be185d")
SHOWN_REWARDS = ("rewards/accuracies", "rewards/margins")  # of what preferences measure
MOST_SHOWN = 1e30  # an axis has no greater number
LEAST_SHARE = 0.6  # part of the loss axis that nine tenths of the steps fill at least


def versions() -> dict[str, str]:
    """Return the versions of Python, the platform and the main packages."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ("onecard", "torch", "transformers", "peft", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


@dataclass
class Report:
    """The content of the report."""

    title: str
    command: str
    config: dict[str, Any]
    data: dict[str, Any]
    memory: list[tuple[str, int]]
    metrics: list[dict[str, Any]]
    num_steps: int
    seconds: float | None  # None: not known
    before: dict[str, float] = field(default_factory=dict)  # each metric of an evaluation by its name
    after: dict[str, float] = field(default_factory=dict)
    samples: list[tuple[str, str, str]] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    next_commands: list[str] = field(default_factory=list)
    sources: list[dict[str, str]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=versions)

    @property
    def loss_before(self) -> float | None:
        return first_loss(self.before)

    @property
    def loss_after(self) -> float | None:
        return first_loss(self.after)


def first_loss(scores: dict[str, float]) -> float | None:
    """Return the loss of the first eval file."""
    return next((value for name, value in scores.items() if name.endswith("loss")), None)


def write_report(output: Path, report: Report) -> None:
    """Write the curve and both reports under `output`."""
    picture = output / "loss_curve.png"
    with about(picture):
        draw_curve(picture, report.metrics, "loss (nats a token)" if report.config["loss"] == "sft" else "loss")
    sections = make_sections(report)
    for name, text in (
        ("report.md", to_markdown(report.title, sections)),
        ("report.html", to_html(report.title, sections, picture)),
    ):
        replace_text(output / name, text)


def store_report(output: Path, report: Report) -> None:
    """Write the content of a report, without the metrics, which have a file of their own."""
    content = {name: value for name, value in asdict(report).items() if name != "metrics"}
    replace_text(output / STORED, json.dumps(content, indent=1, default=str))


def draw_curve(path: Path, metrics: list[dict[str, Any]], unit: str) -> None:
    """Plot each step's loss (thin), the smoothed loss, validation points, and the learning rate on a second axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    steps, losses = points_of(metrics, "loss")
    names = dict.fromkeys(name for row in metrics for name in row if re.fullmatch("eval_(.*_)?loss", name))
    checked = {name: list(zip(*points)) for name in names if (points := points_of(metrics, name))[0]}
    figure, (top, bottom) = pyplot.subplots(
        2, 1, figsize=(8, 5), sharex=True, height_ratios=[4, 1], layout="constrained"
    )
    low, high = limits(losses, [loss for points in checked.values() for _, loss in points])
    top.plot(steps, losses, color="#9db4d0", linewidth=0.8, label="loss a step")
    top.plot(steps, smooth(losses), color="#1f4e8c", linewidth=2, label="smoothed")
    for i, (name, points) in enumerate(checked.items()):
        label = f"validation {name.removeprefix('eval').removesuffix('loss').strip('_')}".rstrip()
        top.plot(*zip(*points), "o", color=VALIDATION_COLOURS[i % len(VALIDATION_COLOURS)], markersize=6, label=label)
    above = [(step, loss) for step, loss in zip(steps, losses) if loss > high]
    if above:
        label = f"above the axis, up to {max(loss for _, loss in above):.4g}"
        top.plot([step for step, _ in above], [high] * len(above), "^", color="#9db4d0", clip_on=False, label=label)
    top.set_ylabel(unit)
    top.set_ylim(low, high)
    top.grid(alpha=0.25)
    top.legend(frameon=False)
    bottom.plot(*points_of(metrics, "learning_rate"), color="#4d7c0f")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("step")
    bottom.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    bottom.grid(alpha=0.25)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def points_of(metrics: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Return the steps that have a number of this name, and the numbers. What no axis holds is left out, as NaN."""
    points = [(row["step"], row[name]) for row in metrics if name in row]
    points = [(step, value) for step, value in points if isfinite(value) and abs(value) < MOST_SHOWN]
    return [step for step, _ in points], [value for _, value in points]


def limits(losses: list[float], checked: list[float]) -> tuple[float, float]:
    """Return the limits of the loss axis. Nine tenths of the steps fill `LEAST_SHARE` of it, unless a validation loss
    is higher. Without the limit, a few high losses, such as a run's first ones, would flatten the rest."""
    low, high = min(losses + checked), max(losses + checked)
    most = sorted(losses)[ceil(0.9 * (len(losses) - 1))]
    if most > low:
        high = max(min(high, low + (most - low) / LEAST_SHARE), *checked, most)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


Section = tuple[str, str, Any]  # heading; "table", "grid", "code" or "samples"; content


def make_sections(report: Report) -> list[Section]:
    rows = [("steps", f"{report.num_steps:,}")]
    rows += [("time", f"{report.seconds:,.1f} s")] if report.seconds is not None else []
    for name in {**report.before, **report.after}:
        if "/" in name and not name.endswith(SHOWN_REWARDS):
            continue
        shown = name.removeprefix("eval_").replace("_", " ")
        for when, scores in (("before", report.before), ("after", report.after)):
            if name in scores:
                rows.append((f"{shown} {when}", f"{scores[name]:.4f}"))
                tokens = report.config["loss"] == "sft" and report.config.get("task", "causal_lm") == "causal_lm"
                if name.endswith("loss") and tokens:
                    rows.append((f"{shown.removesuffix('loss')}perplexity {when}", f"{exp(min(scores[name], 50)):.3f}"))
    rows += list(report.facts.items())
    memory = [(name, format_bytes(num_bytes)) for name, num_bytes in report.memory]
    data = [(name, f"{value:,}" if isinstance(value, int) else str(value)) for name, value in report.data.items()]
    return [
        ("Result", "table", rows),
        ("Before and after", "samples", report.samples),
        ("Memory", "table", memory),
        ("Data", "table", data),
        ("Sources", "grid", report.sources),
        ("Next", "code", "\n".join(report.next_commands)),
        ("Command", "code", report.command),
        ("Settings", "code", json.dumps(report.config, indent=1, default=str)),
        ("Versions", "table", list(report.versions.items())),
    ]


def fence(text: str) -> str:
    """Return a code block whose fence is longer than any run of backticks inside."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}\n{text}\n{ticks}\n"


def to_markdown(title: str, sections: list[Section]) -> str:
    parts = [f"# {title}\n", "![loss curve](loss_curve.png)\n"]
    for heading, kind, content in sections:
        if not content:
            continue
        parts.append(f"## {heading}\n")
        if kind == "table":
            cells = [(str(a).replace("|", "\\|"), str(b).replace("|", "\\|").replace("\n", " ")) for a, b in content]
            parts.append("| | |\n|---|---:|\n" + "".join(f"| {a} | {b} |\n" for a, b in cells))
        elif kind == "grid":
            lines = [list(content[0]), ["---"] * len(content[0]), *(list(row.values()) for row in content)]
            cells = (" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines)
            parts.append("".join(f"| {line} |\n" for line in cells))
        elif kind == "code":
            parts.append(fence(content))
        else:
            for prompt, before, after in content:
                parts.append(f"Prompt\n\n{fence(prompt)}\nBefore\n\n{fence(before)}\nAfter\n\n{fence(after)}")
    return "\n".join(parts)


STYLE = """
:root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem}
img{max-width:100%;background:#fff;border-radius:6px}table{border-collapse:collapse}
td{padding:.2rem 1rem .2rem 0;border-bottom:1px solid #8884}td+td{text-align:right;font-variant-numeric:tabular-nums}
pre{background:#8881;padding:.6rem .8rem;border-radius:6px;white-space:pre-wrap;overflow-wrap:break-word}
.pair{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:1rem}h4{margin:.4rem 0}
"""


def breakable(text: str) -> str:
    """Escape text and mark where a line of JSON may break. A browser breaks a word only in a line without marks."""
    return "<wbr>".join(escape(part) for part in re.split(r"(?<=[,:{}\[\]])", text))


def to_html(title: str, sections: list[Section], picture: Path) -> str:
    image = base64.b64encode(picture.read_bytes()).decode()
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{STYLE}</style>",
        f"<h1>{escape(title)}</h1><img alt='loss curve' src='data:image/png;base64,{image}'>",
    ]
    for heading, kind, content in sections:
        if not content:
            continue
        parts.append(f"<h2>{escape(heading)}</h2>")
        if kind == "table":
            cells = "".join(f"<tr><td>{escape(str(a))}</td><td>{escape(str(b))}</td></tr>" for a, b in content)
            parts.append(f"<table>{cells}</table>")
        elif kind == "grid":
            lines = [content[0], *(row.values() for row in content)]
            cells = ("".join(f"<td>{escape(cell)}</td>" for cell in line) for line in lines)
            parts.append(f"<table>{''.join(f'<tr>{line}</tr>' for line in cells)}</table>")
        elif kind == "code":
            parts.append(f"<pre>{escape(content)}</pre>")
        else:
            for prompt, before, after in content:
                parts.append(
                    f"<pre>{breakable(prompt)}</pre><div class=pair><div><h4>before</h4><pre>{breakable(before)}</pre>"
                    f"</div><div><h4>after</h4><pre>{breakable(after)}</pre></div></div>"
                )
    return "\n".join(parts)
