"""Text tables and joined layer names, shared by plans and comparisons."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

TABLE_WIDTH = 80  # columns of a terminal


def render(table: Table) -> str:
    """Renders a rich table as plain text of fixed width, without colours or trailing spaces.

    The result is the same in terminals, logs and tests.
    """
    out = io.StringIO()
    Console(file=out, width=TABLE_WIDTH, color_system=None, force_terminal=False).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def wrapped(paragraphs: Iterable[str]) -> list[str]:
    """The paragraphs as lines of at most the table's width, continued lines indented."""
    return [
        line
        for text in paragraphs
        for line in textwrap.wrap(text, TABLE_WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    ]


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


def bytes_text(count: float, short: bool = False) -> str:
    """Bytes with a binary unit and three significant digits: `12.5 KiB`, or `12.5K` if short."""
    value = float(count)
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 999.5 and len(units) > 1:
        value /= 1024
        units.pop(0)
    number = f"{value:.0f}" if units[0] == "B" or value >= 100 else f"{value:.3g}"
    return f"{number}{units[0][0]}" if short else f"{number} {units[0]}"


def seconds_text(seconds: float) -> str:
    """Seconds with a unit (s, ms or us) and three significant digits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"
