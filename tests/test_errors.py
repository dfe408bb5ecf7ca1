"""Exact: docs/errors.md shows every kind of bad input that the tests know."""

from pathlib import Path

import pytest

from tests.errors import KINDS

PAGE = Path(__file__).parent.parent / "docs" / "errors.md"


@pytest.mark.parametrize("heading", list(KINDS))
def test_the_page_shows_every_kind(heading):
    section = PAGE.read_text(encoding="utf-8").partition(f"## {heading}\n")[2].partition("\n## ")[0]
    shown = [line.split(" | ")[0].removeprefix("| ") for line in section.splitlines() if line.startswith("| ")]
    assert shown == ["kind", *KINDS[heading]]
