"""Among the partitions under a bound, an even one: where the optimum leaves freedom, no stage stays
small or empty.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable

import numpy as np

from layerwise_jax.partition.stage_costs import Indices, StageCosts
from layerwise_jax.partition.sweep import uniform_starts


def even_boundaries(costs: StageCosts, bound: float, reached: Indices, num_stages: int) -> Indices:
    """Boundaries of `num_stages` stages under the bound, each stop the nearest to an equal share of
    what is left.

    `reached` are the boundaries of a complete sweep from the end under the same bound: a stop is
    never put before the boundary from which the sweep shows that the remaining stages suffice, so
    the walk from the front cannot get stuck. A place where nothing fits is left empty (start equals
    stop); where all places are alike none is.
    """
    last = costs.num_blocks
    floors = np.zeros(num_stages + 1, dtype=np.int64)
    floors[num_stages + 1 - len(reached) :] = reached[::-1]
    floor_of, compute = floors.tolist(), costs.compute.tolist()
    share = (costs.by_place[1][:num_stages] / np.cumsum(costs.by_place[1][:num_stages])).tolist()
    stop_of = _stop_finder(costs, bound)
    boundaries = [0]
    for place in range(num_stages - 1, -1, -1):
        start, floor = boundaries[-1], floor_of[num_stages - place]
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
    """The function to the last stop in least..ideal up to which a stage from `start` fits; `least -
    1` if none does.
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


def _nearest(values: list[float], wanted: float) -> int:
    """The index of the value nearest to the wanted one, in a list that does not decrease."""
    after = min(bisect_left(values, wanted), len(values) - 1)
    return after - 1 if after > 0 and wanted - values[after - 1] < values[after] - wanted else after
