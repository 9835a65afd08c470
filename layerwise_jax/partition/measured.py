"""Partition of layers whose stage memory is measured, for instance by a compiler.

A compiler's memory is not monotone: a longer run of layers may need less than a shorter one. A
measurement therefore covers its own run only. Each round solves the problem that refuses just the
runs measured too large, a relaxation of the true problem. Its optimum is the true optimum once all
its stages are measured and fit; if it has no solution, the true problem has none.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from layerwise_jax._tables import plural
from layerwise_jax.partition.checks import Run
from layerwise_jax.partition.optimize import optimal_solution
from layerwise_jax.partition.problem import Problem
from layerwise_jax.partition.result import CapacityError, Partition
from layerwise_jax.partition.solution import conclude
from layerwise_jax.partition.stage_costs import stage_costs

Measure = Callable[[int, int], float]


def verified_partition(
    problem: Problem, measure: Measure, max_measurements: int | None = None
) -> Partition:
    """The best partition whose stages were all measured and fit the capacity.

    Args:
      problem: has one hard capacity for all stages. Its bytes must not exceed the measured ones,
        since runs that they refuse are not measured.
      measure: (start, stop) -> bytes of the stage of the layers start..stop-1. Called once for each
        run.
      max_measurements: largest number of calls; None for no limit.

    Raises:
      CapacityError: no partition is left; `certificate` holds the measured runs that do not fit.
      RuntimeError: `max_measurements` calls gave neither a partition nor a proof.
      ValueError: the capacity is missing, soft or differs between stages, or `measure` returned no
        size.
    """
    if problem.capacity is None or problem.is_soft or len(set(problem.capacity.tolist())) > 1:
        raise ValueError(
            "capacity must be one hard capacity for all measured stages, got "
            f"{problem.capacity if problem.capacity is None else problem.capacity.tolist()}"
            f"{' with streaming_bandwidth' if problem.is_soft else ''}."
        )
    capacity = float(problem.capacity[0])
    measured = dict[Run, float]()
    while True:
        too_large = frozenset(run for run, size in measured.items() if size > capacity)
        partition = _solve(replace(problem, forbidden=too_large), measured, capacity)
        unknown = [run for run in partition.stages if run not in measured]
        if not unknown:
            return _verified(partition, measured, too_large)
        for run in unknown:
            if len(measured) == max_measurements:
                raise RuntimeError(
                    f"{max_measurements} stages were measured, {len(too_large)} of them too "
                    "large, without a result. Raise max_measurements, the number of stages, or "
                    "the layers' estimated bytes."
                )
            measured[run] = _measured_size(measure, run)


def _solve(problem: Problem, measured: dict[Run, float], capacity: float) -> Partition:
    try:
        return conclude(optimal_solution(stage_costs(problem)), "dp")
    except CapacityError as error:
        if not problem.forbidden:
            raise
        runs = sorted(problem.forbidden)
        largest = max(runs, key=measured.__getitem__)
        raise CapacityError(
            f"No partition into {problem.max_stages} {plural(problem.max_stages, 'stage')} or "
            f"fewer fits {capacity:,.0f} bytes: each contains one of the {len(runs)} of "
            f"{len(measured)} measured stages that do not fit, or one that its layers' sizes "
            f"refuse. The largest is layers {largest[0]}..{largest[1] - 1} with "
            f"{measured[largest]:,.0f} bytes.",
            capacity=capacity,
            certificate=runs,
        ) from error


def _verified(
    partition: Partition, measured: dict[Run, float], too_large: frozenset[Run]
) -> Partition:
    """The partition with measured instead of estimated bytes, and the proof by measurements."""
    evidence = (
        f"{len(measured)} {plural(len(measured), 'stage')} measured, {len(too_large)} of them too "
        f"large, and no partition without those is better: {partition.proof}"
    )
    return replace(
        partition,
        stage_bytes=tuple(measured[run] for run in partition.stages),
        measured=tuple((*run, size) for run, size in measured.items()),
        proof=evidence,
    )


def _measured_size(measure: Measure, run: Run) -> float:
    size = float(measure(*run))
    if not (np.isfinite(size) and size >= 0):
        raise ValueError(
            f"measure must return a finite number of bytes, got {size} for the layers "
            f"{run[0]}..{run[1] - 1}."
        )
    return size
