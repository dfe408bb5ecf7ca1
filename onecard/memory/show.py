"""A plan's lines on the terminal: its terms, what fits, and what would make it fit."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from onecard.memory.measure import format_bytes
from onecard.memory.plan import Plan


def plan_table(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="dim")
    for term in plan.terms:
        table.add_row(term.name, format_bytes(term.num_bytes), term.formula)
    table.add_row("total", format_bytes(plan.total_bytes), "in addition to the process", style="bold")
    for term in plan.disk:
        table.add_row(f"on disk: {term.name}", format_bytes(term.num_bytes), term.formula, style="dim")
    for term in plan.exchanged:
        table.add_row(f"received an update: {term.name}", format_bytes(term.num_bytes), term.formula, style="dim")
    return table


def plan_lines(plan: Plan) -> list[Any]:
    """Return the table, the choice with its cost in time, and what fits."""
    lines: list[Any] = [plan_table(plan)]
    if plan.device_memory_bytes is None:
        return [*lines, "as the settings say, nothing else given up; --device-memory says what train gives up in it"]
    verdict = "fits in" if plan.fits else "does not fit in"
    how = f" with {plan.choice}" if plan.choice else ""
    lines.append(f"{verdict} {format_bytes(plan.device_memory_bytes)}{how}")
    if plan.time is not None and plan.moved_bytes is not None:
        moved = f"; {format_bytes(plan.moved_bytes)} transferred per update" if plan.moved_bytes else ""
        lines.append(f"by count {plan.time:.2f} times the time of a run with everything resident and kept{moved}")
    lines.append(f"largest context {plan.largest_length:,} tokens; largest micro-batch {plan.largest_batch:,} rows")
    if plan.changes:
        lines.append("to make it fit, any one of:")
        lines += [f"  {change.setting}  ({change.time:.2f} times the time a token)" for change in plan.changes]
    return lines
