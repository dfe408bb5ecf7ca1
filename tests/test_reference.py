"""Exact: the reference pages are what the code says, and each setting says what it does."""

import pytest

from tests.reference import DOCS, KINDS, PAGES


@pytest.mark.parametrize("name", list(PAGES))
def test_a_page_is_what_the_code_says(name):
    """Run `python -m tests.reference` after a change of a setting, a command or a public docstring."""
    assert (DOCS / name).read_text(encoding="utf-8") == PAGES[name]()


@pytest.mark.parametrize("kind", KINDS.values())
def test_each_setting_has_a_description(kind):
    assert not [name for name, info in kind.model_fields.items() if not info.description]
