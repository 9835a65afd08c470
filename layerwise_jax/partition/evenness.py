"""Even partition under a bound: uses the freedom of the optimum to avoid small or empty stages."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable

import numpy as np

from layerwise_jax.partition.stage_costs import Indices, StageCosts
from layerwise_jax.partition.sweep import uniform_starts


def even_boundaries(costs: StageCosts, bound: float, reached: Indices, num_stages: int) -> Indices:
    """Boundaries of `num_stages` stages under the bound, by a walk from the front.

    Each stop is the one nearest to an equal share of the remaining compute. A stop is never before
    the boundary from which the sweep shows that the remaining stages suffice, so the walk cannot
    get stuck. A place where nothing fits stays empty (start equals stop); there is none if all
    places are equal.

    Args:
      costs: the problem.
      bound: largest load of a stage.
      reached: boundaries of a complete sweep from the end under the same bound.
      num_stages: number of stages.
    """
    last = costs.num_blocks
    # Lowest stop of each stage: the sweep's boundaries, aligned at the end.
    lowest = np.zeros(num_stages + 1, dtype=np.int64)
    lowest[num_stages + 1 - len(reached) :] = reached[::-1]
    lowest_stop = lowest.tolist()
    compute = costs.compute.tolist()
    share = (costs.by_place[1][:num_stages] / np.cumsum(costs.by_place[1][:num_stages])).tolist()
    stop_of = _stop_finder(costs, bound)
    boundaries = [0]
    for place in range(num_stages - 1, -1, -1):
        start = boundaries[-1]
        floor = lowest_stop[num_stages - place]
        ideal = _nearest(compute, compute[start] + (compute[last] - compute[start]) * share[place])
        least = max(floor, start + 1)
        most = max(floor, last - place)
        boundaries.append(
            stop_of(place, start, least, max(least, min(ideal, most, last)))
            if start < last
            else last
        )
    return np.asarray(boundaries, dtype=np.int64)


def _stop_finder(costs: StageCosts, bound: float) -> Callable[[int, int, int, int], int]:
    """The function (place, start, least, ideal) -> last stop in least..ideal that fits.

    It returns `least - 1` if no stop fits.
    """
    if costs.is_uniform:
        starts = uniform_starts(costs, bound).tolist()
        return lambda place, start, least, ideal: min(ideal, bisect_right(starts, start) - 1)

    def stop_of(place: int, start: int, least: int, ideal: int) -> int:
        stops = range(least, ideal + 1)
        return (
            least
            - 1
            + bisect_left(stops, True, key=lambda stop: not costs.fits(start, stop, bound, place))
        )

    return stop_of


def _nearest(values: list[float], target: float) -> int:
    """Index of the value nearest to `target` in a non-decreasing list."""
    after = min(bisect_left(values, target), len(values) - 1)
    return after - 1 if after > 0 and target - values[after - 1] < values[after] - target else after
