"""What a pipeline will do, in plain numbers: the value behind `print(pipeline.plan)`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rich.table import Table
from rich.text import Text

from layerwise_jax import _json
from layerwise_jax._tables import render, run_lengths
from layerwise_jax.cost.layer_cost import LayerCost

BAR_WIDTH = 20


def plan_table(plan: Any) -> str:
    """A plan as a table, a row a stage, with bounds and notes below."""
    table = Table(title=_title(plan), title_justify="left", title_style="bold")
    for name in ("stage", "layers"):
        table.add_column(name, justify="left", overflow="fold")
    for name in ("weights", "activations", "workspace", "total", "compiled"):
        table.add_column(name, justify="right")
    table.add_column(
        "of the capacity" if plan.capacity else "of the largest", justify="left", no_wrap=True
    )
    table.add_column("sends", justify="right")
    largest = plan.capacity or max(stage.size for stage in plan.stages) or 1
    for s, stage in enumerate(plan.stages):
        table.add_row(
            str(s),
            run_lengths(stage.layers),
            *_sizes(stage),
            _bar(stage.size / largest),
            _bytes(stage.send_bytes),
        )
    return render(table) + "\n".join(_footer(plan)) + "\n"


def _title(plan: Any) -> str:
    capacity = f", {_bytes(plan.capacity)} each" if plan.capacity else ""
    devices = "" if plan.num_devices == plan.num_stages else f" on {plan.num_devices} devices"
    return (
        f"{plan.num_stages} stages{devices}{capacity}, {plan.num_microbatches} microbatches "
        f"({plan.device}; sizes from {plan.measured_on})"
    )


def _sizes(stage: Any) -> list[str]:
    sizes = [
        _bytes(n)
        for n in (stage.weight_bytes, stage.activation_bytes, stage.buffer_bytes, stage.size)
    ]
    return [*sizes, "-" if stage.compiled_bytes is None else _bytes(stage.compiled_bytes)]


def _footer(plan: Any) -> list[str]:
    branch = "the rest under one branch" if plan.has_branch else "no branch"
    proof = "" if plan.gap is None else f", lower bound {plan.lower_bound:.4g}, gap {plan.gap:.2%}"
    fewest = f", fewest stages {plan.fewest_stages}" if plan.fewest_stages else ""
    loop = f"layers of each stage that stand once in the loop: {plan.common_layers} ({branch})"
    last = ", the last for the end of the last stage alone" if plan.has_last_tick else ""
    idle = (
        f"{plan.num_ticks} ticks{last}; bubble {plan.bubble_share:.1%}; padding "
        f"{_bytes(plan.padding_bytes)}; {loop}"
    )
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
