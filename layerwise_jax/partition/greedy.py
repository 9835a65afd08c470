"""Greedy layer aggregation of the paper: each stage takes layers until the next would exceed C.

It uses the fewest stages if all places are equal and sub-runs of runs that fit also fit. It ignores
loads and does not balance: the last stage gets the remaining layers.
"""

from bisect import bisect_left

import numpy as np

from layerwise_jax.partition.certificate import refuse
from layerwise_jax.partition.result import CapacityError
from layerwise_jax.partition.solution import Solution
from layerwise_jax.partition.stage_costs import Indices, StageCosts
from layerwise_jax.partition.sweep import Optimum, least_bottleneck, sweep


def greedy_solution(costs: StageCosts) -> Solution:
    """Fills stage after stage to the capacity; `exactly` reserves a layer for each later stage.

    Raises:
      ValueError: there is no hard capacity to fill, or the objective is a makespan.
      CapacityError: layers remain after the last stage.
    """
    problem = costs.problem
    if problem.capacity is None or problem.is_soft:
        raise ValueError(
            "method='greedy' must have a hard capacity to fill, got none. Give one, or use "
            "method='dp'."
        )
    if problem.objective not in ("bottleneck", "stages"):
        raise ValueError(
            "method='greedy' must have the objective 'bottleneck' or 'stages', got "
            f"'{problem.objective}'. Use method='dp'."
        )
    boundaries = _fill(costs, problem.max_stages)
    if boundaries[-1] < costs.num_blocks:
        failed = sweep(costs, np.inf, problem.max_stages)
        if not failed.is_complete:
            refuse(costs, failed, problem.max_stages)
        raise CapacityError(
            "Greedy filling leaves layers over, though some partition may fit. Use method='dp'."
        )
    boundaries = boundaries if costs.may_idle else np.unique(boundaries)
    count = (
        problem.max_stages
        if problem.objective == "bottleneck"
        else np.count_nonzero(np.diff(boundaries))
    )
    relaxed = least_bottleneck(costs.without_cuts(), int(count))
    assert isinstance(relaxed, Optimum)
    return Solution(costs, boundaries, relaxed.bound, relaxed.failed, "")


def _fill(costs: StageCosts, num_stages: int) -> Indices:
    """Boundaries from the front; the last is below num_blocks if the stages do not suffice."""
    last = costs.num_blocks
    boundaries = [0]
    for place in range(num_stages - 1, -1, -1):
        start = boundaries[-1]
        most = max(start, last - place) if costs.problem.exactly else last
        stops = range(start + 1, most + 1)
        too_long = bisect_left(
            stops, True, key=lambda stop: not costs.is_allowed(start, stop, place)
        )
        boundaries.append(start + too_long)
    return np.asarray(boundaries, dtype=np.int64)
