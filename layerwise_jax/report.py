"""Plans as text tables. A plan prints itself through this module, which therefore imports none."""

from __future__ import annotations

import io
import re
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

BAR_WIDTH = 20
TABLE_WIDTH = 132


def plan_table(plan: Any) -> str:
    """A plan as a table, a row a stage, with bounds and notes below."""
    table = Table(title=_title(plan), title_justify="left", title_style="bold")
    for name in ("stage", "layers"):
        table.add_column(name, justify="left", overflow="fold")
    for name in ("weights", "activations", "workspace", "total", "compiled"):
        table.add_column(name, justify="right")
    table.add_column("of the capacity" if plan.capacity else "of the largest", justify="left", no_wrap=True)
    table.add_column("sends", justify="right")
    largest = plan.capacity or max(stage.size for stage in plan.stages) or 1
    for s, stage in enumerate(plan.stages):
        table.add_row(
            str(s), run_lengths(stage.layers), *_sizes(stage), _bar(stage.size / largest), _bytes(stage.send_bytes)
        )
    return render(table) + "\n".join(_footer(plan)) + "\n"


def render(table: Table) -> str:
    """A rich table as plain text of a fixed width, so that logs and tests see what a terminal sees."""
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
    return ", ".join(piece[0] if len(piece) == 1 else f"{piece[0]}..{piece[-1]}" for piece in pieces)


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


def _title(plan: Any) -> str:
    capacity = f", {_bytes(plan.capacity)} each" if plan.capacity else ""
    devices = "" if plan.num_devices == plan.num_stages else f" on {plan.num_devices} devices"
    return (
        f"{plan.num_stages} stages{devices}{capacity}, {plan.num_microbatches} microbatches "
        f"({plan.device}; sizes from {plan.measured_on})"
    )


def _sizes(stage: Any) -> list[str]:
    sizes = [_bytes(n) for n in (stage.weight_bytes, stage.activation_bytes, stage.buffer_bytes, stage.size)]
    return [*sizes, "-" if stage.compiled_bytes is None else _bytes(stage.compiled_bytes)]


def _footer(plan: Any) -> list[str]:
    branch = "the rest under one branch" if plan.has_branch else "no branch"
    proof = "" if plan.gap is None else f", lower bound {plan.lower_bound:.4g}, gap {plan.gap:.2%}"
    fewest = f", fewest stages {plan.fewest_stages}" if plan.fewest_stages else ""
    loop = f"layers of each stage that stand once in the loop: {plan.common_layers} ({branch})"
    last = ", the last for the end of the last stage alone" if plan.has_last_tick else ""
    idle = f"{plan.num_ticks} ticks{last}; bubble {plan.bubble_share:.1%}; padding {_bytes(plan.padding_bytes)}; {loop}"
    lines = [idle, f"bottleneck {plan.bottleneck:.4g}{proof}{fewest}"]
    return [*lines, *(f"note: {note}" for note in plan.notes)]


def _bar(share: float) -> Text:
    filled = min(BAR_WIDTH, round(share * BAR_WIDTH))
    return Text("█" * filled + "░" * (BAR_WIDTH - filled) + f" {share:.0%}")


def _bytes(count: float) -> str:
    """Bytes in binary units, three significant digits."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.3g} {units[0]}"
