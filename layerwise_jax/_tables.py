"""Text tables and ranges for terminals, shared by plans and comparisons."""

from __future__ import annotations

import io
import re

from rich.console import Console
from rich.table import Table

TABLE_WIDTH = 132


def render(table: Table) -> str:
    """A rich table as plain text of a fixed width, so that logs and tests see what a terminal
    sees.
    """
    out = io.StringIO()
    Console(file=out, width=TABLE_WIDTH, color_system=None, force_terminal=False).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def run_lengths(names: tuple[str, ...]) -> str:
    """Names with runs of consecutive numbers joined: `Block_0..Block_3`."""
    pieces: list[list[str]] = []
    for name in names:
        if pieces and _follows(pieces[-1][-1], name):
            pieces[-1].append(name)
        else:
            pieces.append([name])
    return ", ".join(
        piece[0] if len(piece) == 1 else f"{piece[0]}..{piece[-1]}" for piece in pieces
    )


def _follows(before: str, after: str) -> bool:
    """Whether two names differ in one number, by one."""
    a, b = re.split(r"(\d+)", before), re.split(r"(\d+)", after)
    if len(a) != len(b):
        return False
    differing = [(x, y) for x, y in zip(a, b, strict=True) if x != y]
    return (
        len(differing) == 1
        and all(x.isdigit() for x in differing[0])
        and int(differing[0][1]) == int(differing[0][0]) + 1
    )
