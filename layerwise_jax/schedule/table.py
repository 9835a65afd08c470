"""Schedule: a table of the actions of each device at each tick, and its text form.

    print(one_f_one_b(2, 3))
    0F0  .
    0F1  1F0
    .    1B0
    0B0  1F1
    0F2  1B1
    0B1  1F2
    .    1B2
    0B2  .

Rows are ticks, columns are devices, and a cell holds the actions of its device in its tick. An
action prints as stage, kind and microbatch. A cell holds at most one action or, in a paired table,
one forward followed by one backward, printed `0F2+0B1`. Results of tick t are available from tick
t + 1 on.

Kinds: F is forward, I the gradient of the stage's input, W the gradient of its weights, and B is I
and W in one action.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, Self, get_args

from layerwise_jax._tables import plural
from layerwise_jax.render.html import timeline_html
from layerwise_jax.render.plots import plot_timeline
from layerwise_jax.render.timeline import Span, Timeline
from layerwise_jax.schedule.colours import COLOURS, NAMES

ActionKind = Literal["F", "B", "I", "W"]
ACTION_KINDS: tuple[ActionKind, ...] = get_args(ActionKind)


class ScheduleError(ValueError):
    """Raised for an invalid table; the message shows the place in the table."""


class Action(NamedTuple):
    """One unit of work: a kind of pass of one stage over one microbatch, both counted from 0."""

    stage: int
    kind: ActionKind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"

    @property
    def effects(self) -> tuple["Action", ...]:
        """The actions that this one completes: I and W for B, otherwise the action itself."""
        if self.kind == "B":
            return self._replace(kind="I"), self._replace(kind="W")
        return (self,)

    def needs(self, num_stages: int) -> tuple["Action", ...]:
        """The effects that this action reads, its own forward last."""
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


def round_robin(num_stages: int, num_devices: int) -> tuple[int, ...]:
    """The device of each stage if stages are dealt to devices in turn."""
    return tuple(round_robin_device(stage, num_devices) for stage in range(num_stages))


def round_robin_device(stage: int, num_devices: int) -> int:
    """The device of one stage if stages are dealt to devices in turn."""
    return stage % num_devices


@dataclass(frozen=True, repr=False)
class Schedule:
    """A table of actions, `ticks[tick][device]`; an idle cell is empty.

    The constructor checks the form only: rows of equal length, and cells of at most one forward
    followed by at most one backward. `check` checks the order of the actions.

    Raises:
      ScheduleError: a row or a cell has another form.
    """

    ticks: tuple[tuple[Cell, ...], ...]

    def __post_init__(self) -> None:
        if not any(cell for row in self.ticks for cell in row):
            raise ScheduleError("ticks must have at least one action, got none.")
        for tick, row in enumerate(self.ticks):
            if len(row) != self.num_devices:
                raise ScheduleError(
                    f"tick {tick} must have {self.num_devices} cells as tick 0 has, got "
                    f"{len(row)}. Write '.' for an idle device."
                )
            for device, cell in enumerate(row):
                _check_cell(cell, tick, device)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parses the text form of a schedule; blank lines and comments after `#` are skipped.

        Raises:
          ScheduleError: a cell is neither '.' nor actions joined by '+', or rows differ in length.
        """
        lines = [line.partition("#")[0].split() for line in text.splitlines()]
        return cls(tuple(tuple(map(_parse_cell, cells)) for cells in lines if cells))

    def __str__(self) -> str:
        return "\n".join(align([[cell_text(cell) for cell in row] for row in self.ticks]))

    def __repr__(self) -> str:
        counts = (
            f"{self.num_stages} {plural(self.num_stages, 'stage')}",
            f"{self.num_devices} {plural(self.num_devices, 'device')}",
            f"{self.num_microbatches} {plural(self.num_microbatches, 'microbatch')}",
            f"{self.num_ticks} {plural(self.num_ticks, 'tick')}",
        )
        return f"Schedule({', '.join(counts)})"

    def _repr_html_(self) -> str:
        return timeline_html(self.timeline)

    def plot(self) -> Any:
        """A matplotlib figure of the table: one row a device, one column a tick."""
        return plot_timeline(self.timeline)

    @property
    def timeline(self) -> Timeline:
        """The table as a picture; the actions of a pair take half a tick each."""
        spans = [
            Span(device, str(action), action.kind, tick + start, tick + start + 1 / len(cell))
            for tick, row in enumerate(self.ticks)
            for device, cell in enumerate(row)
            for start, action in zip((0, 1 / 2), cell, strict=False)
        ]
        rows = [f"device {device}" for device in range(self.num_devices)]
        return Timeline(rows, spans, COLOURS, NAMES, repr(self), "tick {:g}".format, "ticks")

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
        """Stage -> the device of its first action."""
        # Reversed, so that the first action of a stage is written last.
        return {stage: device for _, device, (stage, _, _) in reversed(list(self.actions()))}

    @cached_property
    def stages_of_device(self) -> tuple[tuple[int, ...], ...]:
        """The stages of each device, ascending."""
        placed = sorted(self.device_of_stage.items())
        return tuple(
            tuple(stage for stage, home in placed if home == device)
            for device in range(self.num_devices)
        )

    @property
    def is_round_robin(self) -> bool:
        """True if stages are placed as `round_robin` places them."""
        expected = round_robin(self.num_stages, self.num_devices)
        return all(expected[stage] == device for stage, device in self.device_of_stage.items())

    @cached_property
    def tick_of(self) -> dict[Action, int]:
        """F, I or W of a stage and a microbatch -> the tick that completes it."""
        return {effect: tick for tick, _, action in self.actions() for effect in action.effects}

    @cached_property
    def lifetimes(self) -> dict[tuple[int, int], tuple[int, int]]:
        """(stage, microbatch) -> first and last tick, both included, of its residuals.

        Residuals live from the forward to the weight gradient. Empty for a schedule without
        backward. Valid only if `check` accepts the schedule, as all counts made from it.
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
        """Counts of (stage, microbatch) pairs whose residuals are alive, `[tick][device]`."""
        live = [[0] * self.num_devices for _ in self.ticks]
        for (stage, _), (first, last) in self.lifetimes.items():
            for tick in range(first, last + 1):
                live[tick][self.device_of_stage[stage]] += 1
        return tuple(map(tuple, live))

    def in_flight(self, stage: int, until: Literal["W", "I"] = "W") -> int:
        """The most microbatches of a stage that are alive at once; 0 without backward.

        Args:
          stage: the stage.
          until: a microbatch is alive from its forward to its weight gradient ("W") or its input
            gradient ("I"), both ticks included.

        Raises:
          ValueError: there is no such stage.
        """
        if stage not in self.device_of_stage:
            raise ValueError(f"stage must be in 0..{self.num_stages - 1}, got {stage}.")
        live = [0] * self.num_ticks
        for microbatch in range(self.num_microbatches if self.has_backward else 0):
            first = self.tick_of[Action(stage, "F", microbatch)]
            for tick in range(first, self.tick_of[Action(stage, until, microbatch)] + 1):
                live[tick] += 1
        return max(live)

    def peak_live_microbatches(self) -> tuple[int, ...]:
        """For each device, the largest of its `live_microbatches`."""
        return tuple(max(column) for column in zip(*self.live_microbatches(), strict=True))


def _check_cell(cell: Cell, tick: int, device: int) -> None:
    for action in cell:
        if action.kind not in ACTION_KINDS or action.stage < 0 or action.microbatch < 0:
            raise ScheduleError(
                f"device {device} at tick {tick} must have a kind of {', '.join(ACTION_KINDS)} "
                f"and numbers of at least 0, got {action!r}."
            )
    shape = ["F" if action.kind == "F" else "B" for action in cell]
    if shape not in ([], ["F"], ["B"], ["F", "B"]):
        raise ScheduleError(
            f"device {device} at tick {tick} must have one action, or one forward and then one "
            f"backward, got {cell_text(cell)}."
        )


def _parse_cell(text: str) -> Cell:
    return () if text == "." else tuple(map(_parse_action, text.split("+")))


def _parse_action(text: str) -> Action:
    match = re.fullmatch(r"([0-9]+)([FBIW])([0-9]+)", text)
    if match is None:
        raise ScheduleError(
            f"a cell must be stage, kind ({'/'.join(ACTION_KINDS)}) and microbatch as in 2F0, or "
            f"'.' if idle, got {text!r}."
        )
    stage, kind, microbatch = match.groups()
    return Action(
        int(stage), next(known for known in ACTION_KINDS if known == kind), int(microbatch)
    )


def cell_text(cell: Cell) -> str:
    """Text of a cell: actions joined by `+`, as in `0F2+0B1`, or `.` if idle."""
    return "+".join(map(str, cell)) or "."


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Left-aligned lines of a table, columns two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
