"""Columns: the order in which each device does its work in one step. Plain data, no JAX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from layerwise_jax.schedule.table import Schedule, ScheduleError

StepKind = Literal["F", "B", "I", "W", "FB"]


class Step(NamedTuple):
    """One call of a stage program.

    Kinds are those of a schedule, and FB for forward and backward in one program.
    """

    tick: int
    stage: int
    kind: StepKind
    microbatch: int

    def __str__(self) -> str:
        if self.kind == "FB":
            return f"{self.stage}F{self.microbatch}+{self.stage}B{self.microbatch}"
        return f"{self.stage}{self.kind}{self.microbatch}"

    def describe(self) -> str:
        """The step in words, for error messages."""
        words = {
            "F": "forward",
            "B": "backward",
            "I": "input gradient",
            "W": "weight gradient",
            "FB": "forward and backward",
        }
        return f"stage {self.stage}, {words[self.kind]} of microbatch {self.microbatch} ({self})"


Column = tuple[Step, ...]


@dataclass(frozen=True)
class StageTraits:
    """Properties of a stage that decide on its steps and their order.

    Attributes:
      sends: True if another stage reads one of its values.
      has_state: True if a microbatch reads what the one before it wrote.
      has_backward: True if its backward has a result.
      has_products: True if some weight gradient can be computed after the backward.
    """

    sends: bool
    has_state: bool
    has_backward: bool
    has_products: bool

    def does(self, kind: str) -> bool:
        """True if an action of this kind has a result."""
        if kind == "F":
            return True
        return self.has_backward and (kind != "W" or self.has_products)


def lay_out_columns(schedule: Schedule, stages: Sequence[StageTraits]) -> tuple[Column, ...]:
    """The steps of each device of a schedule, in order.

    Backwards without a result are dropped (a stage of metrics, a frozen stage). A forward directly
    before its own backward becomes one step with it, on a stage that sends nothing.

    Raises:
      ScheduleError: a stage with state runs its forwards in another order than that of the
        microbatches.
    """
    _check_state_order(schedule, stages)
    columns: list[list[Step]] = [[] for _ in range(schedule.num_devices)]
    for tick, device, action in schedule.actions():
        stage, kind, microbatch = action
        if not stages[stage].does(kind):
            continue
        column = columns[device]
        follows = bool(column) and column[-1][1:] == (stage, "F", microbatch)
        if kind == "B" and follows and not stages[stage].sends:
            column[-1] = column[-1]._replace(kind="FB")
        else:
            column.append(Step(tick, stage, kind, microbatch))
    return tuple(map(tuple, columns))


def forward_columns(schedule: Schedule) -> tuple[Column, ...]:
    """The forwards of every device, in the schedule's order."""
    columns: list[list[Step]] = [[] for _ in range(schedule.num_devices)]
    for tick, device, (stage, kind, microbatch) in schedule.actions():
        if kind == "F":
            columns[device].append(Step(tick, stage, "F", microbatch))
    return tuple(map(tuple, columns))


def in_one_thread(columns: Sequence[Column]) -> list[tuple[int, Step]]:
    """All (device, step) in the order of the ticks, in which one thread can run them."""
    steps = [(device, step) for device, column in enumerate(columns) for step in column]
    # The sort is stable: a cell's forward stays first.
    return sorted(steps, key=lambda item: (item[1].tick, item[0]))


def _check_state_order(schedule: Schedule, stages: Sequence[StageTraits]) -> None:
    last: dict[int, int] = {}
    for tick, device, (stage, kind, microbatch) in schedule.actions():
        if kind != "F" or not stages[stage].has_state:
            continue
        if microbatch < last.get(stage, -1):
            raise ScheduleError(
                f"The forwards of stage {stage} must run in the order of the microbatches, since "
                f"the stage has state; got {stage}F{microbatch} after {stage}F{last[stage]} "
                f"(tick {tick}, device {device}). Reorder them."
            )
        last[stage] = microbatch
