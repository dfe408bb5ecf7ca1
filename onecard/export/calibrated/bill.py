"""What a 4-bit base costs: its loss next to that of 16 bits and of nearest codes, as calibration.json keeps it."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from onecard.documents import Own, hold, read_object
from onecard.faults import as_user_error

FILE = "calibration.json"
SIXTEEN, NEAREST, CALIBRATED, STARTED = "16 bits", "nearest codes", "calibrated", "calibrated, with its start"


class Losses(Own):
    """Mean cross-entropy a token, in nats: of the data's supervised tokens, and of general text."""

    data: float
    general: float


class Bill(Own):
    """The file calibration.json beside a calibrated base.

    Attributes:
        made_from: what determines the base: the rows, the model and the settings.
        measured_on: which rows `losses` are of.
        tokens: number of tokens: of the calibration, and those measured: "data" and "general text".
        losses: by form of the base.
        nearest: weights in 4 bits with the nearest codes: beside the decoder layers, or experts without a token.
        seconds: time of the calibration, with the measurements.
        files: sha256 of each other file of the base.
    """

    made_from: dict[str, str]
    measured_on: str
    tokens: dict[str, int]
    losses: dict[str, Losses]
    nearest: list[str] = Field(default_factory=list)
    seconds: float
    files: dict[str, str]

    @property
    def closed(self) -> float | None:
        """Return the share of the gap between nearest codes and 16 bits that the base closes; None without a gap."""
        losses = {name: found.data for name, found in self.losses.items()}
        gap = losses[NEAREST] - losses[SIXTEEN]
        return (losses[NEAREST] - losses[self.best]) / gap if gap > 0 else None

    @property
    def best(self) -> str:
        """Return the form in which training begins."""
        return STARTED if STARTED in self.losses else CALIBRATED

    def facts(self) -> dict[str, str]:
        """Return the losses and what they are of, by name."""
        found = {f"base in {name}": f"{x.data:.4f}; general text {x.general:.4f}" for name, x in self.losses.items()}
        if self.closed is not None:
            found["gap to 16 bits closed"] = f"{self.closed:.0%}"
        tokens = self.tokens
        found["measured on"] = (
            f"{tokens['data']:,} tokens of {self.measured_on}, {tokens['general text']:,} of general text"
        )
        found["calibrated on"] = f"{tokens['calibration']:,} tokens in {self.seconds:,.0f} s"
        if self.nearest:
            more = f" and {len(self.nearest) - 4} more" if len(self.nearest) > 4 else ""
            found["with the nearest codes"] = ", ".join(self.nearest[:4]) + more
        return found

    def lines(self) -> list[str]:
        return [f"{name}: {value}" for name, value in self.facts().items()]


def read_bill(folder: Path) -> Bill:
    """Read a calibrated base's calibration.json. Raises UserError for a missing or damaged file."""
    path, do = folder / FILE, f"delete {folder}, so that a run calibrates it again"
    return hold(Bill, read_object(path, do, missing=do), str(path), do)


def draw(path: Path, bill: Bill) -> None:
    """Draw the losses as points, with a line from that of 16 bits: what each form of the base costs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.2 + 0.55 * len(bill.losses)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axis, key, title in ((panels[0], "data", bill.measured_on), (panels[1], "general", "general text")):
        values = [getattr(found, key) for found in bill.losses.values()]
        known = {SIXTEEN: "#8d99a6", NEAREST: "#e09f3e"}
        colours = [known.get(name, "#1f6f8b") for name in bill.losses]
        axis.hlines(list(bill.losses), values[0], values, color=colours, linewidth=3)
        axis.scatter(values, list(bill.losses), color=colours, s=60, zorder=3)
        for name, value in zip(bill.losses, values):
            axis.annotate(f"{value:.3f}", (value, name), (0, 9), textcoords="offset points", ha="center", fontsize=9)
        axis.axvline(values[0], color="#8d99a6", linewidth=1, linestyle=":")
        axis.margins(x=0.2, y=0.35)
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel("loss, nats a token")
        axis.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=150)


def draw_if_there(model: str, output: str) -> list[str]:
    """Draw bill.png in a folder if the model is a calibrated base. Return lines with its numbers."""
    folder, target = Path(model).expanduser(), Path(output)
    if not (folder / FILE).is_file():
        return []
    bill = read_bill(folder)
    with as_user_error(target, lambda: ("the figure is not whole", "draw it again")):
        target.mkdir(parents=True, exist_ok=True)
        draw(target / "bill.png", bill)
    return bill.lines()
