"""What a pipeline will do, in plain numbers: the value behind `print(pipeline.plan)`."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rich.table import Table
from rich.text import Text

from layerwise_jax import _json
from layerwise_jax._tables import TERMINAL_WIDTH, plural, render, run_lengths
from layerwise_jax.cost.layer_cost import LayerCost

BAR_WIDTH = 5
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def plan_table(plan: Any) -> str:
    """A plan as text of 80 columns: a table with one row per stage, bounds and notes below."""
    unit = _unit(max((stage.size for stage in plan.stages), default=0))
    # Without padding nine columns fit 80 characters.
    table = Table(padding=0)
    table.add_column("stage", justify="left")
    table.add_column("layers", justify="left", overflow="fold", ratio=1)
    for name in ("weights", "activa-\ntions", "work-\nspace", "total", "com-\npiled"):
        table.add_column(name, justify="right", no_wrap=True)
    share = "of capacity" if plan.capacity else "of largest"
    table.add_column(share, justify="left", no_wrap=True)
    table.add_column("sends", justify="right", no_wrap=True)
    largest = plan.capacity or max(stage.size for stage in plan.stages) or 1
    for s, stage in enumerate(plan.stages):
        sizes = (stage.weight_bytes, stage.activation_bytes, stage.buffer_bytes, stage.size)
        compiled = stage.compiled_bytes
        table.add_row(
            str(s),
            run_lengths(stage.layers),
            *(_in_unit(size, unit) for size in sizes),
            "-" if compiled is None else _in_unit(compiled, unit),
            _bar(stage.size / largest),
            _in_unit(stage.send_bytes, unit),
        )
    lines = [*_title(plan, unit), *render(table, TERMINAL_WIDTH).splitlines(), *_footer(plan)]
    return "\n".join(wrapped for line in lines for wrapped in _wrap(line)) + "\n"


def _wrap(line: str) -> list[str]:
    """The line, broken at spaces to the width of tables."""
    if len(line) <= TERMINAL_WIDTH:
        return [line]
    return textwrap.wrap(line, TERMINAL_WIDTH, break_long_words=False, break_on_hyphens=False)


def _title(plan: Any, unit: str) -> list[str]:
    capacity = f", capacity {_bytes(plan.capacity)} each" if plan.capacity else ""
    devices = "" if plan.num_devices == plan.num_stages else f" on {plan.num_devices} devices"
    stages = f"{plan.num_stages} {plural(plan.num_stages, 'stage')}{devices}{capacity}"
    microbatches = f"{plan.num_microbatches} {plural(plan.num_microbatches, 'microbatch')}"
    return [
        f"{stages}, {microbatches} ({plan.device})",
        f"sizes in {unit}, from {plan.measured_on}",
    ]


def _footer(plan: Any) -> list[str]:
    branch = "the others under one branch" if plan.has_branch else "no branch"
    proof = "" if plan.gap is None else f", lower bound {plan.lower_bound:.4g}, gap {plan.gap:.2%}"
    fewest = f", fewest stages {plan.fewest_stages}" if plan.fewest_stages else ""
    last = " (the last one for the end of the last stage)" if plan.has_last_tick else ""
    idle = (
        f"{plan.num_ticks} {plural(plan.num_ticks, 'tick')}{last}; bubble "
        f"{plan.bubble_share:.1%}; padding {_bytes(plan.padding_bytes)}"
    )
    loop = f"layers per stage in the common loop body: {plan.common_layers} ({branch})"
    lines = [idle, loop, f"bottleneck {plan.bottleneck:.4g}{proof}{fewest}"]
    return [*lines, *(f"note: {note}" for note in plan.notes)]


def _bar(share: float) -> Text:
    filled = min(BAR_WIDTH, round(share * BAR_WIDTH))
    return Text("█" * filled + "░" * (BAR_WIDTH - filled) + f" {share:.0%}")


def _unit(largest: float) -> str:
    """Unit in which the largest size of a table has one to four digits before the point."""
    index = 0
    while largest >= 1024 ** (index + 1) and index < len(UNITS) - 1:
        index += 1
    return UNITS[index]


def _in_unit(count: float, unit: str) -> str:
    """Bytes in `unit`, three significant digits."""
    value = count / 1024 ** UNITS.index(unit)
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 0.01 or not value else "<0.01"


def _bytes(count: float) -> str:
    """Bytes in binary units, three significant digits."""
    value, units = float(count), UNITS
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.3g} {units[0]}"


PLAN_VERSION = 2


@dataclass(frozen=True)
class Sizes:
    """What was measured of the layers, for which device, by what, and the capacity that they were
    held against.

    `stage_bytes` is what each stage holds compiled as one program, where that was measured.
    """

    costs: tuple[LayerCost, ...]
    device: str
    measured_on: str
    capacity: int | None = None
    notes: tuple[str, ...] = ()
    stage_bytes: tuple[int, ...] | None = None


@dataclass(frozen=True)
class StagePlan:
    """One stage.

    Attributes:
      layers: the names of its layers, in order.
      weight_bytes, activation_bytes, buffer_bytes: sums over its layers, of one microbatch.
      compiled_bytes: what the stage holds at its peak, compiled as one program; None if that was
        not measured.
      send_bytes: bytes of one microbatch that cross the boundary after it.
    """

    layers: tuple[str, ...]
    weight_bytes: int
    activation_bytes: int
    buffer_bytes: int
    compiled_bytes: int | None
    send_bytes: int

    @property
    def size(self) -> int:
        """The sum of the sizes of the stage's layers, S(P) in the paper."""
        return self.weight_bytes + self.activation_bytes + self.buffer_bytes


@dataclass(frozen=True)
class Plan:
    """All stages, and what is known about the whole.

    Attributes:
      stages: the stages in order.
      capacity: bytes that a stage may hold, or None.
      num_devices: devices that the stages of a replica go round; fewer than stages in an
        interleaved schedule.
      num_microbatches: microbatches of each replica; of a ring, its groups of sequences.
      num_ticks: ticks of the forward loop; of a ring, of a round.
      padding_bytes: bytes that all devices together hold in vain, because stages differ.
      common_layers: layers of every stage that stand once in the loop, without a branch.
      has_branch: whether the loop has a branch on the stage index.
      device: the device that the sizes are for.
      measured_on: what compiled the layers to size them.
      bottleneck, lower_bound, gap: the largest stage load, what no partition can beat, and their
        relative distance (None if nothing was proven).
      fewest_stages: how many stages would do under the capacity, if counted.
      notes: the partition's limits, and warnings.
    """

    stages: tuple[StagePlan, ...]
    capacity: int | None
    num_devices: int
    num_microbatches: int
    num_ticks: int
    padding_bytes: int
    common_layers: int
    has_branch: bool
    device: str
    measured_on: str
    bottleneck: float
    lower_bound: float
    gap: float | None
    fewest_stages: int | None
    notes: tuple[str, ...]

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    @property
    def bubble_share(self) -> float:
        """The share of all (device, tick) pairs without a microbatch.

        (d - 1) / (v M + d - 1) in a pipeline of d devices with v stages each; in a ring what stages
        have beyond groups.
        """
        busy = self.num_microbatches * self.num_stages / self.num_devices
        idle = self.num_ticks - busy - self.has_last_tick
        return idle / (busy + idle)

    @property
    def has_last_tick(self) -> bool:
        """Whether there is one more tick, in which the last stage alone does what follows the
        common layers.
        """
        busy = self.num_microbatches * self.num_stages / self.num_devices
        return self.num_ticks - busy > max(self.num_devices - 1, 0)

    def __str__(self) -> str:
        return plan_table(self)

    def to_json(self) -> str:
        """The plan as JSON; `from_json` reads it back."""
        return json.dumps({"version": PLAN_VERSION, **dataclasses.asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """A plan from `to_json`.

        Raises:
          ValueError: not JSON, of another version, or with fields missing, unknown or of the wrong
            type.
        """
        return _json.read(cls, text, PLAN_VERSION, "Plan again.")


def make_plan(
    partition: Any,
    sizes: Sizes,
    *,
    send_bytes: Sequence[int],
    num_devices: int,
    num_microbatches: int,
    num_ticks: int,
    padding_bytes: int,
    common_layers: int,
    has_branch: bool,
) -> Plan:
    """The plan of a partition.

    Args:
      partition: a `Partition`, or its boundaries alone, of which then nothing is proven.
      sizes: what was measured of the layers.
      send_bytes: bytes of one microbatch that every stage sends.
      num_devices: devices of each replica.
      num_microbatches: microbatches of each replica; of a ring, its groups of sequences.
      num_ticks: ticks of the forward loop; of a ring, of a round.
      padding_bytes: bytes held in vain.
      common_layers: layers of every stage that stand once in the loop.
      has_branch: whether the loop has a branch.
    """
    groups = [sizes.costs[a:b] for a, b in pairwise(getattr(partition, "boundaries", partition))]
    compiled = sizes.stage_bytes or (None,) * len(groups)
    stages = tuple(map(_stage_plan, groups, compiled, send_bytes))
    return Plan(
        stages=stages,
        capacity=sizes.capacity,
        num_devices=num_devices,
        num_microbatches=num_microbatches,
        num_ticks=num_ticks,
        padding_bytes=padding_bytes,
        common_layers=common_layers,
        has_branch=has_branch,
        device=sizes.device,
        measured_on=sizes.measured_on,
        bottleneck=float(getattr(partition, "bottleneck", max(stage.size for stage in stages))),
        lower_bound=float(getattr(partition, "lower_bound", 0.0)),
        gap=float(partition.gap) if hasattr(partition, "gap") else None,
        fewest_stages=getattr(partition, "fewest_stages", None),
        notes=tuple(note for note in (*_reasons(partition), *sizes.notes) if note),
    )


def _reasons(partition: Any) -> tuple[str, str]:
    """What blocks a better partition, and why its bound holds."""
    return getattr(partition, "limits", ""), getattr(partition, "proof", "")


def _stage_plan(
    costs: Sequence[LayerCost], compiled_bytes: int | None, send_bytes: int
) -> StagePlan:
    return StagePlan(
        layers=tuple(cost.name for cost in costs),
        weight_bytes=sum(cost.weight_bytes for cost in costs),
        activation_bytes=sum(cost.activation_bytes for cost in costs),
        buffer_bytes=sum(cost.buffer_bytes for cost in costs),
        compiled_bytes=compiled_bytes,
        send_bytes=send_bytes,
    )
