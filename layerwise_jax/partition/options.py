"""Options of the partitioner, shared by `solve`, `solve_measured` and `partition_layers`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from layerwise_jax._arguments import checked_choice, checked_int
from layerwise_jax.partition import checks
from layerwise_jax.schedule.registry import SCHEDULES

OBJECTIVES = ("bottleneck", "stages", "makespan", "lockstep_makespan")
COMMUNICATION = ("add", "overlap")
# Schedules whose microbatches in flight follow from the place of a stage.
COUNTED_SCHEDULES = tuple(name for name, family in SCHEDULES.items() if family.in_flight)


@dataclass(frozen=True, eq=False, kw_only=True)
class SolveOptions:
    """Constraints and objective of a partition. Each value is checked when the options are made.

    Values for each layer are checked by `make_problem`, which knows the layers.

    Attributes:
      max_stages: the most stages; None with objective="stages".
      capacity: bytes of a stage, or (max_stages,) one for each device in order; None for no limit.
      objective: "bottleneck", the largest load; "stages", the fewest stages and with that count the
        smallest bottleneck; "makespan", the sum of loads + (num_microbatches - 1) * bottleneck,
        the time of stages that start when their input is there; "lockstep_makespan",
        (num_microbatches - 1 + stages) * bottleneck, the time of stages that tick together (if
        devices differ, an idle one still relays, so the number of stages is max_stages).
      exactly: demands max_stages non-empty stages instead of at most as many.
      num_microbatches: M, for the makespans and the stash.
      stash_bytes: (n,) bytes that a layer keeps for its backward, for each microbatch in flight.
      schedule: microbatches in flight: "1f1b" holds min(M, stages to the end, its own included),
        "gpipe" M.
      speeds: (max_stages,) factor by which each device is faster than `seconds`, in order. Any
        device may stay idle.
      streaming_bandwidth: bytes per second. If given, the capacity is soft: bytes beyond it cost
        their streaming time.
      communication: "add" adds cut times to the load; "overlap" takes the largest of computing,
        receiving and sending.
      tied_weights: pairs of (layers, bytes): a weight that `weight_bytes` counts in each of the
        layers, and that a stage holds once.
      keep_together: groups of layers; all from the first to the last of a group share a stage.
      keep_apart: pairs of layers that may not share a stage.
      names: (n,) names of the layers in messages.

    Raises:
      ValueError: a value is not one of those above; the message names the option.
    """

    max_stages: int | None = None
    capacity: ArrayLike | None = None
    objective: str = "bottleneck"
    exactly: bool = False
    num_microbatches: int = 1
    stash_bytes: ArrayLike | None = None
    schedule: str = "1f1b"
    speeds: ArrayLike | None = None
    streaming_bandwidth: float | None = None
    communication: str = "add"
    tied_weights: Iterable[tuple[Sequence[int], float]] = ()
    keep_together: Iterable[Sequence[int]] = ()
    keep_apart: Iterable[Sequence[int]] = ()
    names: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.max_stages is not None:
            checked_int("max_stages", self.max_stages)
        checked_int("num_microbatches", self.num_microbatches)
        checked_choice("objective", self.objective, OBJECTIVES)
        checked_choice("schedule", self.schedule, COUNTED_SCHEDULES)
        checked_choice("communication", self.communication, COMMUNICATION)
        checks.per_stage("capacity", self.capacity, self.max_stages)
        checks.positive("speeds", checks.per_stage("speeds", self.speeds, self.max_stages))
        bandwidth = self.streaming_bandwidth
        if bandwidth is not None and not 0 < bandwidth < np.inf:
            raise ValueError(
                f"streaming_bandwidth must be finite and above 0 bytes per second, got {bandwidth}."
            )

    def updated(self, **choices: Any) -> "SolveOptions":
        """These options with some of them replaced.

        Raises:
          TypeError: an option of that name does not exist.
          ValueError: a value is refused.
        """
        names = [field.name for field in fields(self)]
        unknown = sorted(set(choices) - set(names))
        if unknown:
            raise TypeError(f"Options must be among {', '.join(names)}, got {', '.join(unknown)}.")
        return replace(self, **choices)
