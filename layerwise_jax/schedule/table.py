"""Which device does what at which tick: a table and its text.

    print(one_f_one_b(2, 3))
    0F0  .
    0F1  1F0
    .    1B0
    0B0  1F1
    0F2  1B1
    0B1  1F2
    .    1B2
    0B2  .

A row is a tick, a column a device, a cell what that device does in that tick. An action prints as
its stage, its kind and its microbatch. A device performs at most one action a tick or, where the
table pairs them, one forward and then one backward, printed `0F2+0B1`. What an action sends at tick
t can be used from tick t + 1 on.

The kinds are F, forward; I, the gradient of the stage's input; W, the gradient of its weights; and
B, I and W at once.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, Self, get_args

ActionKind = Literal["F", "B", "I", "W"]
ACTION_KINDS: tuple[ActionKind, ...] = get_args(ActionKind)


class ScheduleError(ValueError):
    """A table that is not a schedule; the message shows the place in the table."""


class Action(NamedTuple):
    """One piece of work: stage and microbatch count from 0."""

    stage: int
    kind: ActionKind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"

    @property
    def effects(self) -> tuple["Action", ...]:
        """What is done once the action is done: B does I and W, every other kind itself."""
        if self.kind == "B":
            return self._replace(kind="I"), self._replace(kind="W")
        return (self,)

    def needs(self, num_stages: int) -> tuple["Action", ...]:
        """The effects that must come before, the action's own forward last."""
        stage, kind, microbatch = self
        if kind == "F":
            return (Action(stage - 1, "F", microbatch),) if stage > 0 else ()
        if kind == "W":
            return (Action(stage, "I", microbatch),)
        own_forward = Action(stage, "F", microbatch)
        return (
            (Action(stage + 1, "I", microbatch), own_forward)
            if stage + 1 < num_stages
            else (own_forward,)
        )


Cell = tuple[Action, ...]


@dataclass(frozen=True)
class Schedule:
    """A table of actions, `ticks[tick][device]`; an idle cell is empty.

    Making one checks its form only: rows of one length, and in a cell at most one forward followed
    by at most one backward. Whether its order makes sense is for `check` to say.

    Raises:
      ScheduleError: if a row or a cell has another form.
    """

    ticks: tuple[tuple[Cell, ...], ...]

    def __post_init__(self) -> None:
        if not any(cell for row in self.ticks for cell in row):
            raise ScheduleError("the table has no action; a schedule needs at least one")
        for tick, row in enumerate(self.ticks):
            if len(row) != self.num_devices:
                raise ScheduleError(
                    f"tick {tick} has {len(row)} cells, tick 0 has {self.num_devices}; write '.' "
                    "where a device is idle"
                )
            for device, cell in enumerate(row):
                _check_cell(cell, tick, device)

    @classmethod
    def parse(cls, text: str) -> Self:
        """The schedule that `text` shows, in the form that `str` gives.

        Blank lines and what follows a `#` are skipped.

        Raises:
          ScheduleError: if a cell is neither '.' nor actions joined by '+', or rows differ in
            length.
        """
        lines = [line.partition("#")[0].split() for line in text.splitlines()]
        return cls(tuple(tuple(map(_parse_cell, cells)) for cells in lines if cells))

    def __str__(self) -> str:
        return "\n".join(align([[cell_text(cell) for cell in row] for row in self.ticks]))

    @property
    def num_ticks(self) -> int:
        return len(self.ticks)

    @property
    def num_devices(self) -> int:
        return len(self.ticks[0])

    @cached_property
    def num_stages(self) -> int:
        return 1 + max(action.stage for _, _, action in self.actions())

    @cached_property
    def num_microbatches(self) -> int:
        return 1 + max(action.microbatch for _, _, action in self.actions())

    @cached_property
    def has_backward(self) -> bool:
        return any(action.kind != "F" for _, _, action in self.actions())

    @cached_property
    def device_of_stage(self) -> dict[int, int]:
        """The device on which each stage first acts."""
        return {stage: device for _, device, (stage, _, _) in reversed(list(self.actions()))}

    @cached_property
    def tick_of(self) -> dict[Action, int]:
        """The tick of every effect: F, I and W for each stage and microbatch."""
        return {effect: tick for tick, _, action in self.actions() for effect in action.effects}

    @cached_property
    def lifetimes(self) -> dict[tuple[int, int], tuple[int, int]]:
        """For each (stage, microbatch), the first and the last tick at which the device holds what
        its backward needs.

        That is from its forward to its weight gradient, both included; empty where the schedule has
        no backward. This, and the counts of live microbatches drawn from it, are for a schedule
        that `check` accepts.
        """
        done = self.tick_of
        return {
            (stage, microbatch): (tick, done[Action(stage, "W", microbatch)])
            for (stage, kind, microbatch), tick in done.items()
            if kind == "F" and self.has_backward
        }

    def actions(self) -> Iterator[tuple[int, int, Action]]:
        """Yields (tick, device, action) in the order of the ticks, a cell's forward first."""
        for tick, row in enumerate(self.ticks):
            for device, cell in enumerate(row):
                for action in cell:
                    yield tick, device, action

    def live_microbatches(self) -> tuple[tuple[int, ...], ...]:
        """How many (stage, microbatch) pairs each device holds for their backward,
        `[tick][device]`.
        """
        live = [[0] * self.num_devices for _ in self.ticks]
        for (stage, _), (first, last) in self.lifetimes.items():
            for tick in range(first, last + 1):
                live[tick][self.device_of_stage[stage]] += 1
        return tuple(map(tuple, live))

    def peak_live_microbatches(self) -> tuple[int, ...]:
        """The most (stage, microbatch) pairs that each device holds at once."""
        return tuple(max(column) for column in zip(*self.live_microbatches(), strict=True))


def _check_cell(cell: Cell, tick: int, device: int) -> None:
    for action in cell:
        if action.kind not in ACTION_KINDS or action.stage < 0 or action.microbatch < 0:
            raise ScheduleError(
                f"device {device} at tick {tick} has {action!r}; kinds are "
                f"{', '.join(ACTION_KINDS)}, "
                "numbers from 0"
            )
    shape = ["F" if action.kind == "F" else "B" for action in cell]
    if shape not in ([], ["F"], ["B"], ["F", "B"]):
        raise ScheduleError(
            f"device {device} at tick {tick} has {cell_text(cell)}; a cell takes one action, or "
            "one forward and then"
            " one backward"
        )


def _parse_cell(text: str) -> Cell:
    return () if text == "." else tuple(map(_parse_action, text.split("+")))


def _parse_action(text: str) -> Action:
    match = re.fullmatch(r"([0-9]+)([FBIW])([0-9]+)", text)
    if match is None:
        raise ScheduleError(
            f"{text!r} is not an action; write stage, kind ({'/'.join(ACTION_KINDS)}) and "
            "microbatch as "
            "in 2F0, or '.' if idle"
        )
    stage, kind, microbatch = match.groups()
    return Action(
        int(stage), next(known for known in ACTION_KINDS if known == kind), int(microbatch)
    )


def cell_text(cell: Cell) -> str:
    """The cell as the table shows it, 0F2+0B1 or a dot."""
    return "+".join(map(str, cell)) or "."


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """One line a row, its columns two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
