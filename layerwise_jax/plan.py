"""Plan: what a pipeline will do, in plain numbers; `plan_text` prints and draws it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any

from layerwise_jax import _json
from layerwise_jax._arguments import checked_int
from layerwise_jax._tables import bytes_text, plural
from layerwise_jax.cost.layer_cost import LayerCost
from layerwise_jax.plan_text import plan_bars, plan_html, plan_report, plan_table
from layerwise_jax.render.bars import Bars
from layerwise_jax.render.plots import plot_bars

# A plan is called uneven if the heaviest stage takes this much more than the mean.
UNEVEN = 0.05
PLAN_VERSION = 3


@dataclass(frozen=True)
class Sizes:
    """Measured sizes of the layers, and the device and capacity that they were measured for.

    Attributes:
      costs: cost of each layer.
      device: name of the device.
      measured_on: compiler of the layers, or another source of the sizes.
      capacity: bytes that a stage may hold; None without a cap.
      notes: sentences for the plan.
      stage_bytes: peak bytes of each stage compiled as one program; None if not compiled.
      residency: the stages that exceed the cache and ways to fit them; "" if all fit.
      load_unit: unit of the loads by which the layers were partitioned; "" for relative ones.
    """

    costs: tuple[LayerCost, ...]
    device: str
    measured_on: str
    capacity: int | None = None
    notes: tuple[str, ...] = ()
    stage_bytes: tuple[int, ...] | None = None
    residency: str = ""
    load_unit: str = ""


@dataclass(frozen=True)
class StagePlan:
    """Layers and bytes of one stage.

    Attributes:
      layers: names of its layers, in order.
      weight_bytes, activation_bytes, buffer_bytes: sums over its layers, for one microbatch.
      compiled_bytes: peak bytes of the stage compiled as one program; None if not compiled.
      send_bytes: bytes of one microbatch that cross the boundary after the stage.
    """

    layers: tuple[str, ...]
    weight_bytes: int
    activation_bytes: int
    buffer_bytes: int
    compiled_bytes: int | None
    send_bytes: int

    def __post_init__(self) -> None:
        for name in ("weight_bytes", "activation_bytes", "buffer_bytes", "send_bytes"):
            checked_int(name, getattr(self, name), least=0)
        if self.compiled_bytes is not None:
            checked_int("compiled_bytes", self.compiled_bytes, least=0)

    @property
    def size(self) -> int:
        """Bytes of the stage: the sum of the sizes of its layers, S(P) in the paper."""
        return self.weight_bytes + self.activation_bytes + self.buffer_bytes


@dataclass(frozen=True, repr=False)
class Plan:
    """Plan of a pipeline: its stages, and figures of the whole.

    Attributes:
      stages: the stages in order.
      capacity: bytes that a stage may hold; None without a cap.
      num_devices: pipeline devices of a replica; fewer than stages if devices have several.
      num_microbatches: microbatches of each replica; of a ring, its groups of sequences.
      num_ticks: ticks of the forward loop; of a ring, ticks of a round.
      padding_bytes: padding bytes of all devices together, since stages differ.
      common_layers: layers of each stage in the common body of the loop, which needs no branch.
      has_branch: True if the loop has a branch on the stage index.
      device: name of the device that the sizes are for.
      measured_on: compiler of the layers, or another source of the sizes.
      bottleneck: the largest load of a stage, in `load_unit`.
      lower_bound: lower bound on the bottleneck of any partition.
      gap: their relative distance; None if nothing was proven.
      load_unit: unit of loads: "s", "B" for loads by size, or "" for relative loads.
      fewest_stages: the fewest stages that fit the capacity; None if not counted.
      residency: the stages that exceed the cache and ways to fit them; "" if all fit, or unknown.
      notes: limits of the partition, and warnings.
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
    load_unit: str = ""
    residency: str = ""

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("stages must have at least one stage, got none.")
        for name in ("num_devices", "num_microbatches", "num_ticks"):
            checked_int(name, getattr(self, name))
        for name in ("padding_bytes", "common_layers"):
            checked_int(name, getattr(self, name), least=0)
        if self.num_devices > self.num_stages:
            raise ValueError(
                f"num_devices must be at most the number of stages, {self.num_stages}, got "
                f"{self.num_devices}."
            )
        if self.capacity is not None:
            checked_int("capacity", self.capacity)
        for name in ("bottleneck", "lower_bound", "gap"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value}.")

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    @property
    def bubble_share(self) -> float:
        """Share of all (device, tick) pairs without a microbatch.

        (d - 1) / (v M + d - 1) in a pipeline of d devices with v stages each and M microbatches; in
        a ring, the share of its stages beyond its groups.
        """
        # Counts of (device, tick) pairs, without the last tick for the tail.
        all_pairs = (self.num_ticks - self.has_last_tick) * self.num_devices
        busy = self.num_microbatches * self.num_stages
        return (all_pairs - busy) / all_pairs

    @property
    def has_last_tick(self) -> bool:
        """True if the loop has one more tick, for the last stage's layers after the common body."""
        idle = self.num_ticks * self.num_devices - self.num_microbatches * self.num_stages
        return idle > (self.num_devices - 1) * self.num_devices

    def __str__(self) -> str:
        return plan_table(self)

    def __repr__(self) -> str:
        largest = max(stage.size for stage in self.stages)
        capacity = f" of {bytes_text(self.capacity)}" if self.capacity else ""
        return (
            f"Plan({self.num_stages} {plural(self.num_stages, 'stage')} on {self.num_devices} x "
            f"{self.device}, {self.num_microbatches} "
            f"{plural(self.num_microbatches, 'microbatch')}, largest stage "
            f"{bytes_text(largest)}{capacity}, bubble {self.bubble_share:.1%})"
        )

    def _repr_html_(self) -> str:
        return plan_html(self)

    def plot(self) -> Any:
        """A matplotlib figure: bytes of each stage by kind, and the capacity."""
        return plot_bars(self.bars, repr(self))

    @property
    def bars(self) -> Bars:
        """Bytes of each stage by kind, against the capacity."""
        return plan_bars(self)

    def save_html(
        self, path: str | PathLike[str], schedule: Any = None, comparison: Any = None
    ) -> None:
        """Writes a self-contained report: stages, memory, timeline, strategies.

        Args:
          path: file to write.
          schedule: a `Schedule` or `ScheduleSimulation` for the timeline; None leaves it out.
          comparison: a `Comparison` of strategies; None leaves it out.
        """
        others = (("Timeline", schedule), ("Strategies", comparison))
        html = plan_report(self, [(name, each) for name, each in others if each is not None])
        Path(path).write_text(html, encoding="utf-8")

    def to_json(self) -> str:
        """JSON text that `from_json` reads back."""
        return json.dumps({"version": PLAN_VERSION, **dataclasses.asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Parses the text of `to_json`, of this version or an older one.

        Raises:
          ValueError: not JSON, another version, or fields missing, unknown or of a wrong type.
        """
        return _json.read(cls, text, PLAN_VERSION, "Plan again.", _upgraded)


def _upgraded(entries: dict[str, Any], version: int) -> dict[str, Any]:
    """Entries of versions 1 and 2, which had no residency and no unit of loads."""
    return {"load_unit": "", "residency": "", **entries}


@dataclass(frozen=True, kw_only=True)
class LoopFigures:
    """Figures of the compiled loop that a plan shows.

    Attributes:
      send_bytes: bytes of one microbatch that each stage sends.
      num_devices: pipeline devices of each replica.
      num_microbatches: microbatches of each replica; of a ring, its groups of sequences.
      num_ticks: ticks of the forward loop; of a ring, ticks of a round.
      padding_bytes: padding bytes of all devices together.
      common_layers: layers of each stage in the common body of the loop.
      has_branch: True if the loop has a branch.
    """

    send_bytes: Sequence[int]
    num_devices: int
    num_microbatches: int
    num_ticks: int
    padding_bytes: int
    common_layers: int
    has_branch: bool


def make_plan(partition: Any, sizes: Sizes, loop: LoopFigures) -> Plan:
    """Makes the plan of a partition.

    Args:
      partition: a `Partition`, or its boundaries only, which prove nothing.
      sizes: measured sizes of the layers.
      loop: figures of the loop.
    """
    groups = [sizes.costs[a:b] for a, b in pairwise(getattr(partition, "boundaries", partition))]
    compiled = sizes.stage_bytes or (None,) * len(groups)
    stages = tuple(map(_stage_plan, groups, compiled, loop.send_bytes))
    return Plan(
        stages=stages,
        capacity=sizes.capacity,
        num_devices=loop.num_devices,
        num_microbatches=loop.num_microbatches,
        num_ticks=loop.num_ticks,
        padding_bytes=loop.padding_bytes,
        common_layers=loop.common_layers,
        has_branch=loop.has_branch,
        device=sizes.device,
        measured_on=sizes.measured_on,
        bottleneck=float(getattr(partition, "bottleneck", max(stage.size for stage in stages))),
        lower_bound=float(getattr(partition, "lower_bound", 0.0)),
        gap=float(partition.gap) if hasattr(partition, "gap") else None,
        fewest_stages=getattr(partition, "fewest_stages", None),
        notes=tuple(note for note in (*_reasons(partition), *sizes.notes) if note),
        load_unit=sizes.load_unit if hasattr(partition, "bottleneck") else "B",
        residency=sizes.residency,
    )


def _reasons(partition: Any) -> tuple[str, str]:
    """The limit of the partition, with its unevenness if there is any, and the proof."""
    limits: str = getattr(partition, "limits", "")
    loads: Sequence[float] = getattr(partition, "stage_loads", ())
    mean = sum(loads) / len(loads) if loads else 0.0
    if mean and max(loads) > (1 + UNEVEN) * mean:
        excess = max(loads) / mean - 1
        limits = f"uneven: the heaviest stage takes {excess:.0%} more than the mean. {limits}"
    proof: str = getattr(partition, "proof", "")
    return limits, f"lower bound: {proof}" if proof else ""


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
