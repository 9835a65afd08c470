"""Timeline: how long each step of a training step takes the host and its device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

import jax

from layerwise_jax import processes
from layerwise_jax.schedule.columns import Step
from layerwise_jax.schedule.table import Schedule, align
from layerwise_jax.schedule.timing import ScheduleSimulation, simulate_schedule


class TimedStep(NamedTuple):
    """One call of a stage program, with nothing else running.

    Attributes:
      step: what it did.
      column: where.
      host_seconds: until the call returned: what the column's thread is busy for.
      seconds: until its results were there.
    """

    step: Step
    column: int
    host_seconds: float
    seconds: float


@dataclass(frozen=True)
class Timeline:
    """The calls of a training step, timed one by one.

    Steps that run one at a time show the cost of each; `simulation` lays them out by the schedule.
    A measured step that takes longer than its makespan waits for messages or for the host.
    """

    schedule: Schedule
    calls: tuple[TimedStep, ...]

    def seconds(self, stage: int, kinds: Sequence[str]) -> float:
        """The median of a stage's calls of these kinds, 0 if it has none."""
        found = [
            call.seconds
            for call in self.calls
            if call.step.stage == stage and call.step.kind in kinds
        ]
        return median(found) if found else 0.0

    @property
    def simulation(self) -> ScheduleSimulation:
        """The schedule with these seconds, messages taken as free."""
        stages = range(self.schedule.num_stages)
        both = [self.seconds(s, ("FB",)) for s in stages]
        # A program of both directions is split as 1 : 2, the share of forward in products.
        forward = [self.seconds(s, ("F",)) or both[s] / 3 for s in stages]
        weight = [self.seconds(s, ("W",)) for s in stages]
        split = [self.seconds(s, ("I",)) + weight[s] for s in stages]
        backward = [self.seconds(s, ("B",)) or split[s] or 2 * both[s] / 3 for s in stages]
        # Where backward was not split, half of it counts as the weight gradient.
        halves = [w or b / 2 for w, b in zip(weight, backward, strict=True)]
        return simulate_schedule(self.schedule, forward, backward, halves)

    @property
    def host_share(self) -> float:
        """The largest share of a column's time for which its thread is busy with calls."""
        columns = {call.column for call in self.calls}
        shares = []
        for column in columns:
            own = [call for call in self.calls if call.column == column]
            shares.append(sum(c.host_seconds for c in own) / sum(c.seconds for c in own))
        return max(shares)

    def __str__(self) -> str:
        rows = [["stage", "kind", "calls", "ms", "host ms"]]
        for stage, kind in sorted({(c.step.stage, c.step.kind) for c in self.calls}):
            own = [c for c in self.calls if c.step.stage == stage and c.step.kind == kind]
            times = [
                1e3 * median(c.seconds for c in own),
                1e3 * median(c.host_seconds for c in own),
            ]
            rows.append([str(stage), kind, str(len(own)), *(f"{ms:.3f}" for ms in times)])
        simulated = self.simulation
        summary = (
            f"makespan {1e3 * simulated.makespan:.2f} ms, bubble {simulated.bubble_share:.1%}, "
            f"host busy {self.host_share:.1%} of a column's time"
        )
        return "\n".join([*align(rows), summary])


@dataclass
class StepClock:
    """Times steps: `start` before each, `observe` with its results."""

    spans: list[TimedStep] = field(default_factory=list)
    _step: Step | None = None
    _column: int = 0
    _started: float = 0.0

    def start(self, step: Step, column: int) -> None:
        self._step, self._column, self._started = step, column, processes.stopwatch()

    def observe(self, results: Any) -> None:
        returned = processes.stopwatch()
        # The call has returned; now wait for the device.
        jax.block_until_ready(results)
        done = processes.stopwatch()
        assert self._step is not None
        times = returned - self._started, done - self._started
        self.spans.append(TimedStep(self._step, self._column, *times))
