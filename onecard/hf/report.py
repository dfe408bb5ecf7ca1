"""transformers' loading report: every tensor that it lists is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onecard.errors import UserError


def check_report(report: dict[str, Any], folder: Path) -> None:
    """Raise UserError for missing, extra or mismatched tensors in transformers' loading report."""
    for kind, what in (
        ("missing_keys", "missing"),
        ("unexpected_keys", "not part of the model"),
        ("mismatched_keys", "wrongly shaped"),
        ("error_msgs", "in error"),
    ):
        names = sorted(map(entry_text, report.get(kind) or ()))
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            raise UserError(
                "the checkpoint must contain exactly the model's tensors",
                f"{what}: {', '.join(names[:8])}{more}",
                "fetch the checkpoint again, or correct its config.json",
                str(folder),
            )


def entry_text(entry: Any) -> str:
    """Format an entry of the report. A mismatch is (name, shape found, shape expected)."""
    if isinstance(entry, tuple) and len(entry) == 3:
        return f"{entry[0]} {list(entry[1])} instead of {list(entry[2])}"
    return str(entry)
