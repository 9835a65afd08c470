"""Problem of the partitioner: layers, constraints and objective as checked numbers.

`make_problem` checks all values once. Indices, here and in every module of this folder: layers are
0..n-1, boundaries are 0..n, and a run of layers `(start, stop)` holds the layers start..stop-1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from layerwise_jax.partition import checks
from layerwise_jax.partition.checks import Floats, Run
from layerwise_jax.partition.options import SolveOptions


@dataclass(frozen=True, eq=False)
class Problem:
    """Checked numbers in the caller's units; see `SolveOptions` for the meaning of each.

    Attributes:
      overlap: True for communication="overlap".
      forbidden: runs that may not be a stage, found by measurements.
    """

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
        """True if bytes beyond the capacity are streamed, False if they are refused."""
        return self.capacity is not None and self.streaming_bandwidth is not None


def make_problem(
    seconds: ArrayLike,
    weight_bytes: ArrayLike | None,
    transient_bytes: ArrayLike | None = None,
    cut_seconds: ArrayLike | None = None,
    options: SolveOptions | None = None,
    **choices: Any,
) -> Problem:
    """Checks the arguments of `solve` and converts them to arrays.

    Args:
      seconds: as in `solve`.
      weight_bytes: as in `solve`.
      transient_bytes: as in `solve`.
      cut_seconds: as in `solve`.
      options: constraints and objective; None for the defaults.
      **choices: single options by name, which replace those in `options`.

    Raises:
      ValueError: a value is refused or contradicts another one; the message names it.
      TypeError: an unknown option.
    """
    options = (options or SolveOptions()).updated(**choices)
    times = checks.amounts("seconds", np.asarray(seconds, dtype=np.float64))
    n = len(times)
    together = options.keep_together
    apart = options.keep_apart
    weights = checks.per_layer("weight_bytes", weight_bytes, n)
    problem = Problem(
        seconds=times,
        weight_bytes=weights,
        transient_bytes=checks.per_layer("transient_bytes", transient_bytes, n),
        cut_seconds=checks.per_boundary("cut_seconds", cut_seconds, n),
        max_stages=n if options.max_stages is None else int(options.max_stages),
        capacity=checks.per_stage("capacity", options.capacity, options.max_stages),
        objective=options.objective,
        exactly=bool(options.exactly),
        num_microbatches=int(options.num_microbatches),
        stash_bytes=checks.per_layer("stash_bytes", options.stash_bytes, n),
        schedule=options.schedule,
        speeds=checks.per_stage("speeds", options.speeds, options.max_stages),
        streaming_bandwidth=options.streaming_bandwidth,
        overlap=options.communication == "overlap",
        tied_weights=tuple(_tie(layers, size, weights) for layers, size in options.tied_weights),
        keep_together=tuple(checks.span("keep_together", group, n) for group in together),
        keep_apart=tuple(checks.pair("keep_apart", layers, n) for layers in apart),
        names=checks.labels("names", options.names, n),
    )
    _check_count(problem, options.max_stages)
    _check_groups(problem)
    return problem


def _tie(layers: Sequence[int], size: float, weights: Floats) -> tuple[tuple[int, ...], float]:
    """The layers and bytes of one tied weight."""
    members = tuple(sorted({int(layer) for layer in layers}))
    checks.span("tied_weights", members, len(weights))
    most = weights[list(members)].min()
    if not (np.isfinite(size) and 0 <= size <= most):
        raise ValueError(
            f"tied_weights of the layers {list(members)} must be from 0 to {most:,.0f} bytes, the "
            f"smallest of their weight_bytes, which count the weight in each layer, got {size}."
        )
    return members, float(size)


def _check_groups(problem: Problem) -> None:
    """Refuses layers both together and apart, and more exact stages than blocks."""
    joined = _joined(problem.keep_together)
    for first, last in problem.keep_apart:
        if joined.issuperset(range(first + 1, last + 1)):
            raise ValueError(
                f"keep_apart must not have pairs that keep_together joins, got the layers {first} "
                f"and {last}. Drop one of the two."
            )
    blocks = problem.num_layers - len(joined)
    if problem.exactly and problem.max_stages > blocks:
        raise ValueError(
            f"max_stages must be at most {blocks} with exactly=True, the number of blocks of the "
            f"{problem.num_layers} layers, got {problem.max_stages}. Ask for {blocks} or fewer."
        )


def _check_count(problem: Problem, max_stages: int | None) -> None:
    """Refuses contradictions between the objective and the number of stages."""
    if problem.objective != "stages":
        if max_stages is None:
            raise ValueError(
                "max_stages must be a number of stages unless objective='stages', got None."
            )
        return
    if problem.exactly:
        raise ValueError(
            "exactly must be False with objective='stages', which looks for the count, got True. "
            "Drop one of them."
        )
    for name, values in (("capacity", problem.capacity), ("speeds", problem.speeds)):
        if values is not None and (values != values[0]).any():
            raise ValueError(
                f"{name} must be equal for all devices with objective='stages', got "
                f"{values.tolist()}."
            )


def _joined(groups: tuple[Run, ...]) -> set[int]:
    """Boundaries inside groups of `keep_together`; overlapping groups act as one."""
    return {boundary for first, last in groups for boundary in range(first + 1, last + 1)}
