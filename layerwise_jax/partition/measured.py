"""Stages whose memory is measured, by a compiler for instance: verify, forbid what does not fit,
solve again.

A compiler's memory is not monotone: a longer run of layers may need less than a shorter one, so a
measurement says something about its own run and nothing about others. Every round solves the
problem in which only the runs that were measured too large are refused. Such a problem is a
relaxation of the true one; its optimum, once all its stages are measured and fit, is therefore the
true optimum, and if it has no solution the true problem has none either.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from layerwise_jax.partition.checks import Run
from layerwise_jax.partition.optimize import optimal_plan
from layerwise_jax.partition.problem import Problem
from layerwise_jax.partition.result import CapacityError, Partition
from layerwise_jax.partition.solution import conclude
from layerwise_jax.partition.stage_costs import stage_costs

Measure = Callable[[int, int], float]


def verified_partition(
    problem: Problem, measure: Measure, max_measurements: int | None = None
) -> Partition:
    """The best partition whose every stage was measured and fits the capacity.

    Args:
        problem: with a hard capacity, the same for all stages. Its bytes should be no more than
            what will be measured: runs that they refuse are not measured.
        measure: bytes of the stage that holds the layers start..stop-1. Called once a run.
        max_measurements: give up after so many.

    Raises:
        CapacityError: no partition is left; `certificate` holds the runs that were measured and do
          not fit.
        RuntimeError: `max_measurements` were made and neither a partition nor a proof was found.
        ValueError: the capacity is missing, soft, or differs between stages, or `measure` returned
          no size.
    """
    if problem.capacity is None or problem.is_soft or len(set(problem.capacity.tolist())) > 1:
        raise ValueError(
            f"capacity is {problem.capacity}; one hard capacity is wanted to hold measurements "
            "against."
        )
    capacity, measured = float(problem.capacity[0]), dict[Run, float]()
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
                    "large, without an end: "
                    "raise max_measurements, the number of stages, or the bytes that each layer "
                    "is said to need."
                )
            measured[run] = _measured_size(measure, run)


def _solve(problem: Problem, measured: dict[Run, float], capacity: float) -> Partition:
    try:
        return conclude(optimal_plan(stage_costs(problem)), "dp")
    except CapacityError as error:
        if not problem.forbidden:
            raise
        runs = sorted(problem.forbidden)
        largest = max(runs, key=measured.__getitem__)
        raise CapacityError(
            f"No partition into {problem.max_stages} stages or fewer fits {capacity:,.0f} bytes: "
            "each holds one of the "
            f"{len(runs)} stages, of {len(measured)} measured, that do not fit, or one that its "
            "layers' sizes refuse. "
            f"The largest is layers {largest[0]}..{largest[1] - 1} with {measured[largest]:,.0f} "
            "bytes.",
            capacity=capacity,
            certificate=runs,
        ) from error


def _verified(
    partition: Partition, measured: dict[Run, float], too_large: frozenset[Run]
) -> Partition:
    """The partition with measured bytes for estimated ones, and what the measurements prove."""
    evidence = (
        f"{len(measured)} stages were measured, {len(too_large)} of them do not fit, and no "
        "partition without those is "
        f"better: {partition.proof}"
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
            f"measuring layers {run[0]}..{run[1] - 1} gave {size}; a finite number of bytes is "
            "wanted."
        )
    return size
