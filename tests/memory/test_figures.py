"""Exact: the figures show the numbers that they are drawn from."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from onecard.demo.run import SETTINGS
from onecard.errors import UserError
from onecard.memory.figures import levels_and_density, memory_bill, plot_plan
from onecard.memory.plan import plan
from onecard.quant.codebook import quant_map


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, by their path."""
    figures, save = {}, Figure.savefig

    def keep(figure, path, **more):
        save(figure, path, **more)
        figures[Path(path)] = figure

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def test_memory_bill(tmp_path, drawn):
    bills = memory_bill(tmp_path / "bill.png")
    totals = [sum(bills[method].values()) for method in ("full", "lora", "qlora")]
    assert totals == sorted(totals, reverse=True)
    (axis,) = drawn[tmp_path / "bill.png"].axes
    for row, method in enumerate(bills):
        bars = [bar for bar in axis.patches if abs(bar.get_y() + bar.get_height() / 2 - row) < 0.1]
        assert [bar.get_width() for bar in bars] == pytest.approx(list(bills[method].values()), rel=1e-12)
        assert max(bar.get_x() + bar.get_width() for bar in bars) == pytest.approx(totals[row], rel=1e-12)
    words = {text.get_text() for text in axis.texts}
    assert {f"{total:.1f} GB" for total in totals} <= words
    assert all(text.get_position()[0] < axis.get_xlim()[1] for text in axis.texts)


def test_nf4_is_nearer_than_the_others(tmp_path, drawn):
    path = tmp_path / "levels.png"
    errors = levels_and_density(path, SETTINGS["model"])
    assert errors["nf4", False] < errors["int4", False] and errors["nf4", False] < errors["fp4", False]
    assert errors["nf4", True] < 1.02 * errors["nf4", False]  # double quantization costs little
    top, bottom = drawn[path].axes
    lines = [[segment[0][0] for segment in found.get_segments()] for found in top.collections]
    assert lines == [quant_map("nf4").tolist(), [x for x in quant_map("int4").tolist() if abs(x) <= 1]]
    assert [bar.get_width() / 100 for bar in bottom.patches] == pytest.approx(list(errors.values()), rel=1e-12)


def test_a_plan_is_plotted_or_told_why_not(tmp_path, drawn):
    found = plan("llama-2-7b", device_memory_bytes=6 * 10**9)
    plot_plan(tmp_path / "plan.png", found, "llama-2-7b")
    (axis,) = drawn[tmp_path / "plan.png"].axes
    names = [label.get_text() for label in axis.get_yticklabels()]
    bars = dict(zip(names, (bar.get_width() * 1e9 for bar in axis.patches)))
    assert bars == pytest.approx({term.name: term.num_bytes for term in found.terms}, rel=1e-12)
    assert f"{found.total_bytes / 1e9:.2f} GB of 6.00 GB" in axis.get_title(loc="left")
    for name in ("no/such/folder/plan.png", "plan.docx"):
        with pytest.raises(UserError, match=r"must be (written|of a kind that can be drawn)"):
            plot_plan(tmp_path / name, found, "llama-2-7b")
