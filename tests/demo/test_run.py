"""Behaviour: a demo that teaches nothing fails."""

import io

import pytest
from rich.console import Console

from onecard.demo import run as demo
from onecard.errors import UserError


def test_no_rise_in_accuracy_is_an_error(tmp_path, monkeypatch):
    """With a learning rate of almost nothing the answers stay as wrong as before."""
    monkeypatch.setattr(demo, "SETTINGS", {**demo.SETTINGS, "max_steps": 1, "learning_rate": 1e-12})
    monkeypatch.setattr(demo, "read_rows", lambda path, read=demo.read_rows: read(path)[:4])
    with pytest.raises(UserError, match=r"0\.0% before, 0\.0% after, with torch"):
        demo.run_demo(str(tmp_path / "o"), Console(file=io.StringIO(), width=100))
