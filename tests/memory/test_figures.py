"""Behaviour: the two figures and the numbers they are drawn from."""

import pytest

from onecard.demo.run import SETTINGS
from onecard.errors import UserError
from onecard.memory.figures import levels_and_density, memory_bill, plot_plan
from onecard.memory.plan import plan


def test_memory_bill(tmp_path):
    bills = memory_bill(tmp_path / "bill.png")
    totals = [sum(bills[method].values()) for method in ("full", "lora", "qlora")]
    assert totals == sorted(totals, reverse=True)
    assert (tmp_path / "bill.png").stat().st_size > 10_000


def test_nf4_is_nearer_than_the_others(tmp_path):
    errors = levels_and_density(tmp_path / "levels.png", SETTINGS["model"])
    assert errors["nf4", False] < errors["int4", False] and errors["nf4", False] < errors["fp4", False]
    assert errors["nf4", True] < 1.02 * errors["nf4", False]  # double quantization costs little
    assert (tmp_path / "levels.png").stat().st_size > 10_000


def test_a_plan_is_plotted_or_told_why_not(tmp_path):
    found = plan("llama-2-7b", device_memory_bytes=6 * 10**9)
    plot_plan(tmp_path / "plan.png", found, "llama-2-7b")
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    for name in ("no/such/folder/plan.png", "plan.docx"):
        with pytest.raises(UserError, match=r"must be (written|of a kind that can be drawn)"):
            plot_plan(tmp_path / name, found, "llama-2-7b")
