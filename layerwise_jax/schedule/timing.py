"""Simulation of a schedule for given seconds of its stages: makespan, busy and idle time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from layerwise_jax._tables import seconds_text
from layerwise_jax.render import timeline
from layerwise_jax.render.html import timeline_html
from layerwise_jax.render.plots import plot_timeline
from layerwise_jax.render.timeline import Timeline
from layerwise_jax.schedule.colours import COLOURS, NAMES
from layerwise_jax.schedule.table import Action, ActionKind, Schedule
from layerwise_jax.schedule.validation import check

# Seconds: one number for all stages (or boundaries), one for each, or [stages, microbatches].
Seconds = ArrayLike
Floats = NDArray[np.float64]


class Span(NamedTuple):
    """One simulated action: its device, and start and end in seconds from the schedule's start."""

    action: Action
    device: int
    start: float
    end: float


@dataclass(frozen=True)
class ScheduleSimulation:
    """Simulated times of a schedule, in seconds.

    Attributes:
      schedule: the simulated table.
      spans: one for each action, in the order of `schedule.actions()`.
    """

    schedule: Schedule
    spans: tuple[Span, ...]

    @cached_property
    def makespan(self) -> float:
        """Seconds from the start of the schedule to the end of its last action."""
        return max(span.end for span in self.spans)

    @cached_property
    def busy_seconds(self) -> tuple[float, ...]:
        """For each device, seconds in which it computes."""
        busy = [0.0] * self.schedule.num_devices
        for span in self.spans:
            busy[span.device] += span.end - span.start
        return tuple(busy)

    @property
    def idle_seconds(self) -> tuple[float, ...]:
        """For each device, the makespan less its busy seconds."""
        return tuple(self.makespan - busy for busy in self.busy_seconds)

    @property
    def bubble_share(self) -> float:
        """Idle share of all devices' time, from 0 to 1; 0 if the makespan is 0."""
        total = self.makespan * self.schedule.num_devices
        return sum(self.idle_seconds) / total if total else 0.0

    @cached_property
    def peak_live_microbatches(self) -> tuple[int, ...]:
        """For each device, the most (stage, microbatch) pairs whose residuals are alive at once."""
        return self.schedule.peak_live_microbatches()

    def _repr_html_(self) -> str:
        return timeline_html(self.timeline)

    def plot(self) -> Any:
        """A matplotlib figure of the spans: one row a device, times in seconds."""
        return plot_timeline(self.timeline)

    @property
    def timeline(self) -> Timeline:
        """The spans as a picture."""
        return Timeline(
            [f"device {device}" for device in range(self.schedule.num_devices)],
            [
                timeline.Span(span.device, str(span.action), span.action.kind, span.start, span.end)
                for span in self.spans
            ],
            COLOURS,
            NAMES,
            f"makespan {seconds_text(self.makespan)}, bubble {self.bubble_share:.1%}",
        )

    def __str__(self) -> str:
        lines = [
            f"makespan {self.makespan:.6g} s, bubble {self.bubble_share:.1%}",
            f"{'device':>6}  {'busy s':>10}  {'idle s':>10}  {'peak live microbatches':>22}",
        ]
        columns = zip(
            self.busy_seconds, self.idle_seconds, self.peak_live_microbatches, strict=True
        )
        for device, (busy, idle, live) in enumerate(columns):
            lines.append(f"{device:>6}  {busy:>10.4g}  {idle:>10.4g}  {live:>22}")
        return "\n".join(lines)


def simulate_schedule(
    schedule: Schedule,
    forward_seconds: Seconds,
    backward_seconds: Seconds,
    weight_gradient_seconds: Seconds | None = None,
    link_seconds: Seconds = 0.0,
    lockstep: bool = False,
) -> ScheduleSimulation:
    """Simulates `schedule` for stages of the given seconds.

    Each device performs its actions in the order of the table. An action starts as soon as its
    device is free and its operands have arrived. With `lockstep`, a tick starts only after all
    devices have finished the tick before and its messages have arrived, as in a loop that exchanges
    messages once a tick.

    Args:
      schedule: any schedule that `check` accepts.
      forward_seconds: seconds of a forward of one microbatch: one number, one for each stage, or
        [stages, microbatches] where microbatches differ in size.
      backward_seconds: seconds of input and weight gradient together, in the same form.
      weight_gradient_seconds: seconds of W if the backward is split; None for half of
        `backward_seconds`.
      link_seconds: seconds of a message between two devices in either direction, one number or one
        for each boundary (s to s + 1). Messages between stages of one device take none.
      lockstep: True if devices proceed tick by tick.

    Raises:
      ScheduleError: `check` refuses the schedule.
      ValueError: seconds are negative or of another length, or W takes longer than the backward.
    """
    check(schedule)
    costs = _kind_seconds(schedule, forward_seconds, backward_seconds, weight_gradient_seconds)
    links = _per_boundary("link_seconds", link_seconds, schedule.num_stages - 1)
    spans = (
        _run_in_step(schedule, costs, links) if lockstep else _run_freely(schedule, costs, links)
    )
    return ScheduleSimulation(schedule, tuple(spans))


def _run_freely(
    schedule: Schedule, costs: Mapping[ActionKind, Floats], links: Sequence[float]
) -> list[Span]:
    """Spans of devices that wait only for operands.

    One pass over the table suffices, since it lists every action after those that it reads.
    """
    free_at = [0.0] * schedule.num_devices  # seconds, by device
    done_at: dict[Action, float] = {}
    spans: list[Span] = []
    for _, device, action in schedule.actions():
        arrivals = (
            done_at[need] + _link_seconds(schedule, action.stage, need.stage, links)
            for need in action.needs(schedule.num_stages)
        )
        start = max(free_at[device], *arrivals, 0.0)
        free_at[device] = start + float(costs[action.kind][action.stage, action.microbatch])
        spans.append(Span(action, device, start, free_at[device]))
        done_at.update(dict.fromkeys(action.effects, free_at[device]))
    return spans


def _run_in_step(
    schedule: Schedule, costs: Mapping[ActionKind, Floats], links: Sequence[float]
) -> list[Span]:
    """Spans of devices that all start a tick together."""
    spans: list[Span] = []
    tick_start = 0.0
    for row in schedule.ticks:
        tick_end = tick_start
        slowest_link = 0.0
        for device, cell in enumerate(row):
            now = tick_start
            for action in cell:
                start = now
                now += float(costs[action.kind][action.stage, action.microbatch])
                spans.append(Span(action, device, start, now))
                slowest_link = max(slowest_link, _sending_seconds(schedule, action, links))
            tick_end = max(tick_end, now)
        tick_start = tick_end + slowest_link
    return spans


def _sending_seconds(schedule: Schedule, action: Action, links: Sequence[float]) -> float:
    """Seconds of the message with an action's result; 0 if no other device reads it."""
    receiver = action.stage + {"F": 1, "B": -1, "I": -1, "W": 0}[action.kind]
    return (
        _link_seconds(schedule, action.stage, receiver, links)
        if 0 <= receiver < schedule.num_stages
        else 0.0
    )


def _link_seconds(schedule: Schedule, stage: int, other: int, links: Sequence[float]) -> float:
    on_one_device = schedule.device_of_stage[stage] == schedule.device_of_stage[other]
    return 0.0 if on_one_device else links[min(stage, other)]


def _kind_seconds(
    schedule: Schedule,
    forward_seconds: Seconds,
    backward_seconds: Seconds,
    weight_gradient_seconds: Seconds | None,
) -> dict[ActionKind, Floats]:
    """Kind -> [stages, microbatches], seconds of each action."""
    forward = _per_action("forward_seconds", forward_seconds, schedule)
    backward = _per_action("backward_seconds", backward_seconds, schedule)
    if weight_gradient_seconds is None:
        weight_gradient_seconds = backward / 2
    weight_gradient = _per_action("weight_gradient_seconds", weight_gradient_seconds, schedule)
    too_long = np.argwhere(weight_gradient > backward)
    if len(too_long):
        stage, microbatch = too_long[0]
        raise ValueError(
            f"weight_gradient_seconds of stage {stage} must be at most its backward_seconds, "
            f"{backward[stage, microbatch]}, which include it, got "
            f"{weight_gradient[stage, microbatch]}."
        )
    return {"F": forward, "B": backward, "I": backward - weight_gradient, "W": weight_gradient}


def _per_action(name: str, seconds: Seconds, schedule: Schedule) -> Floats:
    """[stages, microbatches] of at least 0, from one number, one for each stage, or all."""
    values = np.asarray(seconds, dtype=float)
    shape = (schedule.num_stages, schedule.num_microbatches)
    if values.shape not in ((), shape[:1], shape):
        raise ValueError(
            f"{name} must have shape (), ({shape[0]},), one number for each stage, or {shape}, got "
            f"{values.shape}."
        )
    _check_not_negative(name, values)
    return np.broadcast_to(values[:, None] if values.ndim == 1 else values, shape)


def _per_boundary(name: str, seconds: Seconds, count: int) -> list[float]:
    values = np.asarray(seconds, dtype=float)
    if values.shape not in ((), (count,)):
        raise ValueError(
            f"{name} must have shape () or ({count},), one number for each boundary, got "
            f"{values.shape}."
        )
    _check_not_negative(name, values)
    return np.broadcast_to(values, (count,)).tolist()


def _check_not_negative(name: str, values: Floats) -> None:
    if not np.all(values >= 0):
        raise ValueError(f"{name} must be at least 0, got {values}.")
