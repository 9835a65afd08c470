"""Text tables and joined layer names, shared by plans and comparisons."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

TABLE_WIDTH = 132
TERMINAL_WIDTH = 80


def render(table: Table, width: int = TABLE_WIDTH) -> str:
    """Renders a rich table as plain text of fixed width, without colours or trailing spaces.

    The result is the same in terminals, logs and tests.
    """
    out = io.StringIO()
    Console(file=out, width=width, color_system=None, force_terminal=False).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def run_lengths(names: Iterable[str]) -> str:
    """Joins names with commas, runs of consecutive numbers as `Block_0..Block_3`."""
    runs: list[list[str]] = []
    for name in names:
        if runs and _follows(runs[-1][-1], name):
            runs[-1].append(name)
        else:
            runs.append([name])
    return ", ".join(run[0] if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)


def _follows(before: str, after: str) -> bool:
    """True if `after` is `before` with exactly one of its numbers raised by one."""
    before_parts = re.split(r"(\d+)", before)
    after_parts = re.split(r"(\d+)", after)
    if len(before_parts) != len(after_parts):
        return False
    differing = [(a, b) for a, b in zip(before_parts, after_parts, strict=True) if a != b]
    if len(differing) != 1:
        return False
    first, second = differing[0]
    return first.isdigit() and second.isdigit() and int(second) == int(first) + 1


def plural(count: int, noun: str) -> str:
    """`noun`, in the plural unless `count` is 1."""
    if count == 1:
        return noun
    return f"{noun}es" if noun.endswith(("ch", "s", "x")) else f"{noun}s"
