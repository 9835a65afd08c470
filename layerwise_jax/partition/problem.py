"""What the partitioner is asked: checked numbers, in the caller's units.

A `Problem` is made once, by `make_problem`, which refuses wrong values by name; nothing after it
checks again. Index letters, here and in every module beside it: layers are 0..n-1, boundaries 0..n,
and a run of layers `(start, stop)` holds the layers start..stop-1.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike

from layerwise_jax._arguments import checked_choice, checked_int
from layerwise_jax.partition import checks
from layerwise_jax.partition.checks import Floats, Run

_OBJECTIVES = ("bottleneck", "stages", "makespan", "lockstep_makespan")


class SolveOptions(TypedDict, total=False):
    """The choices that every way into the partitioner takes. None need be given but max_stages.

    max_stages: the most stages; None with objective="stages".
    capacity: bytes of a stage, or (max_stages,) one for each device in order.
    objective: "bottleneck", the largest load; "stages", the fewest stages and among those the
        smallest bottleneck; "makespan", the sum of loads + (num_microbatches - 1) * bottleneck,
        where each stage starts when its input is there; "lockstep_makespan", (num_microbatches - 1
        + stages) * bottleneck, where all stages tick together (where devices differ, one that is
        passed over still relays, so the number of stages is max_stages).
    exactly: demand max_stages non-empty stages instead of at most as many.
    num_microbatches: M, for the makespans and the stash.
    stash_bytes: (n,) bytes that a layer keeps for every microbatch in flight, for the backward
      pass.
    schedule: microbatches in flight: "1f1b" holds min(M, stages to the end, its own included),
      "gpipe" M.
    speeds: (max_stages,) how many times faster than `seconds` each device is, in order. Any may
      stay idle.
    streaming_bandwidth: bytes per second. Given, the capacity is soft: what exceeds it costs its
      streaming time.
    communication: "add" cut times to the load, or "overlap": the largest of computing, receiving
      and sending.
    tied_weights: pairs of (layers, bytes): a weight that each of the layers counts, held once by a
      stage.
    keep_together: groups of layers; all from the first to the last of a group share a stage.
    keep_apart: pairs of layers that may not share a stage.
    names: (n,) what to call the layers in messages.
    """

    max_stages: int | None
    capacity: ArrayLike | None
    objective: str
    exactly: bool
    num_microbatches: int
    stash_bytes: ArrayLike | None
    schedule: str
    speeds: ArrayLike | None
    streaming_bandwidth: float | None
    communication: str
    tied_weights: Iterable[tuple[Sequence[int], float]]
    keep_together: Iterable[Sequence[int]]
    keep_apart: Iterable[Sequence[int]]
    names: Sequence[str] | None


@dataclass(frozen=True, eq=False)
class Problem:
    """Layers, constraints and objective, checked; `SolveOptions` says what each of them means."""

    seconds: Floats
    weight_bytes: Floats
    transient_bytes: Floats
    cut_seconds: Floats
    max_stages: int
    capacity: Floats | None
    objective: str
    exactly: bool
    num_microbatches: int
    stash_bytes: Floats
    schedule: str
    speeds: Floats | None
    streaming_bandwidth: float | None
    overlap: bool
    tied_weights: tuple[tuple[tuple[int, ...], float], ...]
    keep_together: tuple[Run, ...]
    keep_apart: tuple[Run, ...]
    names: tuple[str, ...]
    forbidden: frozenset[Run] = field(default=frozenset())

    @property
    def num_layers(self) -> int:
        return len(self.seconds)

    @property
    def is_soft(self) -> bool:
        """Whether bytes beyond the capacity are streamed instead of refused."""
        return self.capacity is not None and self.streaming_bandwidth is not None


def make_problem(
    seconds: ArrayLike,
    weight_bytes: ArrayLike | None,
    transient_bytes: ArrayLike | None = None,
    cut_seconds: ArrayLike | None = None,
    *,
    max_stages: int | None = None,
    capacity: ArrayLike | None = None,
    objective: str = "bottleneck",
    exactly: bool = False,
    num_microbatches: int = 1,
    stash_bytes: ArrayLike | None = None,
    schedule: str = "1f1b",
    speeds: ArrayLike | None = None,
    streaming_bandwidth: float | None = None,
    communication: str = "add",
    tied_weights: Iterable[tuple[Sequence[int], float]] = (),
    keep_together: Iterable[Sequence[int]] = (),
    keep_apart: Iterable[Sequence[int]] = (),
    names: Sequence[str] | None = None,
) -> Problem:
    """Check all that `solve` takes, by name. Raises ValueError for what is wrong or contradicts
    something else.
    """
    times = checks.amounts("seconds", np.asarray(seconds, dtype=np.float64))
    n = len(times)
    weights = checks.per_layer("weight_bytes", weight_bytes, n)
    problem = Problem(
        seconds=times,
        weight_bytes=weights,
        transient_bytes=checks.per_layer("transient_bytes", transient_bytes, n),
        cut_seconds=checks.per_boundary("cut_seconds", cut_seconds, n),
        max_stages=n if max_stages is None else checked_int("max_stages", max_stages),
        capacity=checks.per_stage("capacity", capacity, max_stages),
        objective=checked_choice("objective", objective, _OBJECTIVES),
        exactly=bool(exactly),
        num_microbatches=checked_int("num_microbatches", num_microbatches),
        stash_bytes=checks.per_layer("stash_bytes", stash_bytes, n),
        schedule=checked_choice("schedule", schedule, ("1f1b", "gpipe")),
        speeds=checks.positive("speeds", checks.per_stage("speeds", speeds, max_stages)),
        streaming_bandwidth=_bandwidth(streaming_bandwidth),
        overlap=checked_choice("communication", communication, ("add", "overlap")) == "overlap",
        tied_weights=tuple(_tie(layers, size, weights) for layers, size in tied_weights),
        keep_together=tuple(checks.span("keep_together", group, n) for group in keep_together),
        keep_apart=tuple(checks.pair("keep_apart", layers, n) for layers in keep_apart),
        names=checks.labels("names", names, n),
    )
    _refuse_contradictions(problem, max_stages)
    return problem


def _bandwidth(value: float | None) -> float | None:
    if value is not None and not 0 < value < np.inf:
        raise ValueError(f"streaming_bandwidth is {value}; bytes per second above 0 are wanted.")
    return value


def _tie(layers: Sequence[int], size: float, weights: Floats) -> tuple[tuple[int, ...], float]:
    members = tuple(sorted({int(layer) for layer in layers}))
    checks.span("tied_weights", members, len(weights))
    if not (np.isfinite(size) and 0 <= size <= weights[list(members)].min()):
        raise ValueError(
            f"tied_weights gives {size} bytes to the layers {list(members)}; at least 0 and at "
            "most the weight_bytes "
            "of each of them is wanted, since weight_bytes counts the tied weight in every layer "
            "that uses it."
        )
    return members, float(size)


def _refuse_contradictions(problem: Problem, max_stages: int | None) -> None:
    """Check what depends on more than one value."""
    _refuse_count(problem, max_stages)
    joined = _joined(problem.keep_together)
    for first, last in problem.keep_apart:
        if joined.issuperset(range(first + 1, last + 1)):
            raise ValueError(
                f"keep_apart parts the layers {first} and {last}, which keep_together joins: drop "
                "one."
            )
    blocks = problem.num_layers - len(joined)
    if problem.exactly and problem.max_stages > blocks:
        raise ValueError(
            f"exactly {problem.max_stages} non-empty stages are asked of {problem.num_layers} "
            "layers, "
            f"{blocks} of which can be told apart: ask for {blocks} or fewer."
        )


def _refuse_count(problem: Problem, max_stages: int | None) -> None:
    if problem.objective != "stages":
        if max_stages is None:
            raise ValueError(
                "max_stages is None; a number of stages is wanted, or objective='stages' for the "
                "fewest."
            )
        return
    if problem.exactly:
        raise ValueError(
            "objective='stages' looks for the count that exactly=True gives: drop one of them."
        )
    for name, values in (("capacity", problem.capacity), ("speeds", problem.speeds)):
        if values is not None and (values != values[0]).any():
            raise ValueError(
                f"{name} differs between devices; objective='stages' counts devices that are alike."
            )


def _joined(groups: tuple[Run, ...]) -> set[int]:
    """The boundaries inside groups of layers that stay together; groups that overlap act as one."""
    return {boundary for first, last in groups for boundary in range(first + 1, last + 1)}
