"""Memory of a column: a walk over its steps with the bytes of each stage. Plain numbers, no JAX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from layerwise_jax.host.columns import Column


@dataclass(frozen=True)
class StageBytes:
    """Bytes that a stage's steps hold for one microbatch.

    Attributes:
      arrived: values from other stages, held from their arrival until backward.
      stash: state that was read, and residuals, held from forward until backward.
      cotangents: what comes back from consumers, held from the input gradient until the weight
        gradient.
      workspace: temporaries and results of one call, by kind of step.
    """

    arrived: int
    stash: int
    cotangents: int
    workspace: Mapping[str, int]


@dataclass(frozen=True)
class ColumnMemory:
    """Peak bytes on each device of a column in a training step.

    Attributes:
      weights: placed parameters, those that a tied weight repeats included.
      prepared: what the prelude makes of them, and constants.
      accumulators: sums of gradients and outputs.
      held: arrived values, stashes and cotangents of the microbatches between forward and backward.
      waiting: values that have arrived early, at most.
      workspace: temporaries and results of the call at the peak.
      optimizer: state of the optimizer, 0 where none was given.
    """

    weights: int
    prepared: int
    accumulators: int
    held: int
    waiting: int
    workspace: int
    optimizer: int = 0

    @property
    def peak(self) -> int:
        return sum(vars(self).values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in vars(self).items())
        return f"{self.peak / 1e9:.2f} GB: {parts}"


def walk_column(column: Column, stages: Mapping[int, StageBytes]) -> tuple[int, int]:
    """(bytes held, bytes of workspace) at the step of a column at which their sum is largest.

    Args:
      column: the steps.
      stages: the bytes of every stage of the column.
    """
    held = 0
    peak = (0, 0)
    trains = any(step.kind != "F" for step in column)
    for step in column:
        stage = stages[step.stage]
        if step.kind == "F":
            held += stage.arrived + stage.stash if trains else 0
        if step.kind == "I":
            held += stage.cotangents
        now = stage.workspace.get(step.kind, 0)
        if step.kind in ("FB", "F"):
            now += stage.arrived if step.kind == "FB" or not trains else 0
        if step.kind == "B":
            now += stage.cotangents
        peak = max(peak, (held, now), key=sum)
        if step.kind in ("B", "W"):
            held -= stage.arrived + stage.stash
        if step.kind == "W":
            held -= stage.cotangents
    return peak


def most_in_flight(column: Column, stage: int) -> int:
    """The most microbatches of a stage between forward and backward at once; at least 1."""
    live = most = 1 if any(step.stage == stage and step.kind == "FB" for step in column) else 0
    for step in column:
        if step.stage == stage and step.kind == "F":
            live += 1
            most = max(most, live)
        if step.stage == stage and step.kind in ("B", "W"):
            live -= 1
    return most


def waiting_bytes(
    makers: Sequence[tuple[int, int]], in_flight: Mapping[int, int], consumer: int
) -> int:
    """Bytes of values that have arrived at a stage and wait for it, at most.

    A stage that makes a value runs ahead of the consumer by no more than the microbatches that it
    has in flight itself, less those that the consumer has begun.

    Args:
      makers: (stage that makes it, bytes) of every value that the consumer reads.
      in_flight: the most microbatches in flight, by stage.
      consumer: the stage.
    """
    ahead = [(max(0, in_flight[maker] - in_flight[consumer]), size) for maker, size in makers]
    return sum(count * size for count, size in ahead)
