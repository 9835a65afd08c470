"""How long a schedule takes and how much of that its devices idle, for given costs of its
stages.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from layerwise_jax.schedule.table import Action, ActionKind, Schedule
from layerwise_jax.schedule.validation import check

# One number for all stages (or boundaries), or one for each.
Seconds = ArrayLike


class Span(NamedTuple):
    """An action as it ran: on which device, from when until when, in seconds from the start."""

    action: Action
    device: int
    start: float
    end: float


@dataclass(frozen=True)
class ScheduleSimulation:
    """What a schedule does in time; `spans` in the order in which the table shows the actions.
    Seconds throughout.
    """

    schedule: Schedule
    spans: tuple[Span, ...]

    @cached_property
    def makespan(self) -> float:
        """From the first action's start to the last one's end."""
        return max(span.end for span in self.spans)

    @cached_property
    def busy_seconds(self) -> tuple[float, ...]:
        """For each device, the time that it computes."""
        busy = [0.0] * self.schedule.num_devices
        for span in self.spans:
            busy[span.device] += span.end - span.start
        return tuple(busy)

    @property
    def idle_seconds(self) -> tuple[float, ...]:
        """For each device, the time within the makespan that it does not compute."""
        return tuple(self.makespan - busy for busy in self.busy_seconds)

    @property
    def bubble_share(self) -> float:
        """The idle part of all devices' time, between 0 and 1; 0 where nothing takes any time."""
        total = self.makespan * self.schedule.num_devices
        return sum(self.idle_seconds) / total if total else 0.0

    @cached_property
    def peak_live_microbatches(self) -> tuple[int, ...]:
        """For each device, the most (stage, microbatch) pairs that it holds at once for their
        backward.
        """
        return self.schedule.peak_live_microbatches()

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
    """Runs `schedule` for stages of the given costs.

    Every device does its actions in the table's order, each as soon as the device is free and what
    it uses has arrived. With `lockstep` no device begins a tick before all have done the tick
    before and its messages have arrived, as in a loop that exchanges its messages once a tick.

    Args:
      schedule: any schedule that `check` accepts.
      forward_seconds: of one microbatch, one number or one a stage.
      backward_seconds: of input and weight gradient together.
      weight_gradient_seconds: the part of backward_seconds that a split backward leaves to W; half
        of it if None.
      link_seconds: how long a message takes between two devices, either way, one number or one a
        boundary (stage s to s + 1). Stages on one device exchange theirs in no time.
      lockstep: whether the devices keep step.

    Raises:
      ScheduleError: if `check` refuses the schedule.
      ValueError: if a cost is negative, of another length, or a weight gradient longer than its
        backward.
    """
    check(schedule)
    costs = _kind_seconds(schedule, forward_seconds, backward_seconds, weight_gradient_seconds)
    links = _per_item("link_seconds", link_seconds, schedule.num_stages - 1, "boundary")
    spans = (
        _run_in_step(schedule, costs, links) if lockstep else _run_freely(schedule, costs, links)
    )
    return ScheduleSimulation(schedule, tuple(spans))


def _run_freely(
    schedule: Schedule, costs: Mapping[ActionKind, Sequence[float]], links: Sequence[float]
) -> list[Span]:
    """One pass suffices: a checked table shows every action after all that it waits for."""
    free_at = [0.0] * schedule.num_devices
    done_at: dict[Action, float] = {}
    spans = []
    for _, device, action in schedule.actions():
        arrivals = (
            done_at[need] + _link_seconds(schedule, action.stage, need.stage, links)
            for need in action.needs(schedule.num_stages)
        )
        start = max(free_at[device], *arrivals, 0.0)
        free_at[device] = start + costs[action.kind][action.stage]
        spans.append(Span(action, device, start, free_at[device]))
        done_at.update(dict.fromkeys(action.effects, free_at[device]))
    return spans


def _run_in_step(
    schedule: Schedule, costs: Mapping[ActionKind, Sequence[float]], links: Sequence[float]
) -> list[Span]:
    spans, tick_start = [], 0.0
    for row in schedule.ticks:
        tick_end, slowest_link = tick_start, 0.0
        for device, cell in enumerate(row):
            now = tick_start
            for action in cell:
                start, now = now, now + costs[action.kind][action.stage]
                spans.append(Span(action, device, start, now))
                slowest_link = max(slowest_link, _sending_seconds(schedule, action, links))
            tick_end = max(tick_end, now)
        tick_start = tick_end + slowest_link
    return spans


def _sending_seconds(schedule: Schedule, action: Action, links: Sequence[float]) -> float:
    """The time of the message with the action's result, 0 where no other device waits for it."""
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
) -> dict[ActionKind, list[float]]:
    forward = _per_item("forward_seconds", forward_seconds, schedule.num_stages, "stage")
    backward = _per_item("backward_seconds", backward_seconds, schedule.num_stages, "stage")
    if weight_gradient_seconds is None:
        weight_gradient_seconds = [seconds / 2 for seconds in backward]
    weight_gradient = _per_item(
        "weight_gradient_seconds", weight_gradient_seconds, schedule.num_stages, "stage"
    )
    input_gradient = [whole - part for whole, part in zip(backward, weight_gradient, strict=True)]
    for stage, seconds in enumerate(input_gradient):
        if seconds < 0:
            raise ValueError(
                f"weight_gradient_seconds of stage {stage} is {weight_gradient[stage]}, more than "
                "the whole backward's "
                f"{backward[stage]}; backward_seconds counts input and weight gradient together"
            )
    return {"F": forward, "B": backward, "I": input_gradient, "W": weight_gradient}


def _per_item(name: str, seconds: Seconds, count: int, item: str) -> list[float]:
    values = np.asarray(seconds, dtype=float)
    if values.ndim == 0:
        values = np.full(count, values)
    if values.shape != (count,):
        raise ValueError(
            f"{name} has shape {values.shape}, wanted ({count},); give one number, or one a {item}"
        )
    if not np.all(values >= 0):
        raise ValueError(f"{name} is {values}; give seconds, none below 0")
    return values.tolist()
