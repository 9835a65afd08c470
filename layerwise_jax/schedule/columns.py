"""Columns: the order in which each device does its work in one step. Plain data, no JAX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from layerwise_jax.schedule.table import Schedule, ScheduleError

StepKind = Literal["F", "B", "I", "W", "FB"]


class Step(NamedTuple):
    """One call of a stage program: F, B, I and W as in a schedule, FB forward and backward in one
    program.
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
    """What a stage has to do, as far as the order of steps depends on it.

    Attributes:
      sends: whether another stage reads one of its values.
      has_state: whether a microbatch reads what the one before it wrote.
      has_backward: whether backward has any result.
      has_products: whether any weight gradient can be made apart from backward.
    """

    sends: bool
    has_state: bool
    has_backward: bool
    has_products: bool

    def does(self, kind: str) -> bool:
        """Whether an action of this kind has any result."""
        if kind == "F":
            return True
        return self.has_backward and (kind != "W" or self.has_products)


def lay_out_columns(schedule: Schedule, stages: Sequence[StageTraits]) -> tuple[Column, ...]:
    """The steps of every device of a schedule, in order.

    Backwards without a result are dropped (a stage of metrics, a frozen stage). A forward that its
    own backward follows
    at once, on a stage that sends nothing, becomes one step.

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
    """All (device, step) in an order in which one thread can run them: that of the ticks."""
    steps = [(device, step) for device, column in enumerate(columns) for step in column]
    return sorted(
        steps, key=lambda item: (item[1].tick, item[0])
    )  # stable: a cell's forward stays first


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
