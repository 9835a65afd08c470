"""Texts and pictures of a plan: a table of 80 columns, HTML, and the bars of its stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from layerwise_jax._tables import (
    bytes_text,
    plural,
    render,
    run_lengths,
    seconds_text,
    wrapped,
)
from layerwise_jax.render.bars import Bar, Bars, Segment
from layerwise_jax.render.html import bars_html, page, table_html, text_html

BAR_WIDTH = 6


def plan_table(plan: Any) -> str:
    """A plan as text of at most 80 columns: what is not resident, a row a stage, bounds, notes."""
    largest = plan.capacity or max(stage.size for stage in plan.stages) or 1
    columns = ["weights", "activ.", "work", "total", "compiled"]
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("stage", justify="right")
    table.add_column("layers", overflow="fold")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("of capacity" if plan.capacity else "of largest", no_wrap=True)
    table.add_column("sends", justify="right", no_wrap=True)
    for s, stage in enumerate(plan.stages):
        table.add_row(str(s), run_lengths(stage.layers), *_cells(stage, largest))
    return (
        "\n".join([*wrapped(_header(plan)), render(table).rstrip(), *wrapped(_footer(plan))]) + "\n"
    )


def _cells(stage: Any, largest: int) -> list[str]:
    sizes = (stage.weight_bytes, stage.activation_bytes, stage.buffer_bytes, stage.size)
    compiled = "-" if stage.compiled_bytes is None else bytes_text(stage.compiled_bytes, short=True)
    share = stage.size / largest
    filled = min(BAR_WIDTH, round(share * BAR_WIDTH))
    bar = "█" * filled + "░" * (BAR_WIDTH - filled)
    return [
        *(bytes_text(count, short=True) for count in sizes),
        compiled,
        f"{bar} {share:.0%}",
        bytes_text(stage.send_bytes, short=True),
    ]


def _header(plan: Any) -> list[str]:
    capacity = f", {bytes_text(plan.capacity)} of capacity each" if plan.capacity else ""
    devices = "" if plan.num_devices == plan.num_stages else f" on {plan.num_devices} devices"
    title = (
        f"{plan.num_stages} {plural(plan.num_stages, 'stage')}{devices}{capacity}, "
        f"{plan.num_microbatches} {plural(plan.num_microbatches, 'microbatch')}, for "
        f"{plan.device}. Sizes in bytes (K, M, G, T: KiB, MiB, GiB, TiB) from {plan.measured_on}."
    )
    return [plan.residency, title] if plan.residency else [title]


def _footer(plan: Any) -> list[str]:
    branch = "the rest under one branch" if plan.has_branch else "no branch"
    load = _load_text(plan.bottleneck, plan.load_unit)
    bound = _load_text(plan.lower_bound, plan.load_unit)
    proof = "" if plan.gap is None else f", lower bound {bound}, gap {plan.gap:.2%}"
    fewest = f", fewest stages {plan.fewest_stages}" if plan.fewest_stages else ""
    last = ", the last one for the tail of the last stage" if plan.has_last_tick else ""
    ticks = f"{plan.num_ticks} {plural(plan.num_ticks, 'tick')}{last}"
    return [
        f"{ticks}; bubble {plan.bubble_share:.1%}; padding {bytes_text(plan.padding_bytes)}",
        f"layers of each stage in the common body of the loop: {plan.common_layers} ({branch})",
        f"bottleneck {load}{proof}{fewest}",
        *(f"note: {note}" for note in plan.notes),
    ]


def _stage_bar(s: int, stage: Any) -> Bar:
    parts = (
        Segment("weights", stage.weight_bytes),
        Segment("activations", stage.activation_bytes),
        Segment("workspace", stage.buffer_bytes),
    )
    layers = f"layers {run_lengths(stage.layers)}"
    return Bar(f"stage {s}", parts, f"{layers}; sends {bytes_text(stage.send_bytes)}")


def _report_row(s: int, stage: Any) -> list[str]:
    compiled = "-" if stage.compiled_bytes is None else bytes_text(stage.compiled_bytes)
    sizes = (stage.weight_bytes, stage.activation_bytes, stage.buffer_bytes)
    return [
        str(s),
        run_lengths(stage.layers),
        *map(bytes_text, sizes),
        compiled,
        bytes_text(stage.send_bytes),
    ]


def _load_text(load: float, unit: str) -> str:
    """A load with its unit; relative loads, such as FLOPs, have none."""
    if unit == "s":
        return seconds_text(load)
    return bytes_text(load) if unit == "B" else f"{load:.4g}"


def plan_bars(plan: Any) -> Bars:
    """Bytes of each stage by kind, against the capacity."""
    bars = [_stage_bar(s, stage) for s, stage in enumerate(plan.stages)]
    return Bars(bars, bytes_text, plan.capacity)


def plan_html(plan: Any) -> str:
    """The plan for a notebook: header, bars of the stages, bounds and notes."""
    return text_html(_header(plan)) + bars_html(plan_bars(plan)) + text_html(_footer(plan))


def plan_report(plan: Any, others: Sequence[tuple[str, Any]]) -> str:
    """A whole page: memory, stages, and a section for each other value.

    Args:
      plan: the plan.
      others: (heading, value) of values with a `_repr_html_`.
    """
    head = ["stage", "layers", "weights", "activations", "workspace", "compiled", "sends"]
    rows = [_report_row(s, stage) for s, stage in enumerate(plan.stages)]
    sections = [("Memory", plan_html(plan)), ("Stages", table_html(head, rows))]
    sections += [(heading, value._repr_html_()) for heading, value in others]
    return page(repr(plan), sections)
