"""General method: dynamic programming over all cuts, exact for any costs and refused runs.

    best[r][start] = min over stop of combine(cost(start, stop) at place r, best[r - 1][stop])

`combine` is max for the bottleneck and + for a sum. A row of the table holds the runs that start at
one block, the shortest first, so its width is that of the longest run under a bound. Time is
O(stages x blocks x width), memory O(blocks x width).
"""

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from layerwise_jax.partition.checks import Floats
from layerwise_jax.partition.stage_costs import Indices, StageCosts, earliest_starts
from layerwise_jax.partition.sweep import uniform_starts

_MOST_RUNS = 2**24


@dataclass(frozen=True, eq=False)
class Search:
    """Result of the dynamic program.

    Attributes:
      totals: [num_places + 1], the least total of the partitions into r stages.
      choices: [num_places, num_blocks + 1], blocks of the best run by place and start.
    """

    totals: Floats
    choices: NDArray[np.int32]

    def boundaries(self, num_stages: int) -> Indices:
        """Block boundaries of a best partition into `num_stages` stages, from the front.

        An idle place repeats its boundary.
        """
        reached = [0]
        for place in range(num_stages - 1, -1, -1):
            reached.append(reached[-1] + int(self.choices[place, reached[-1]]))
        return np.asarray(reached, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class RunTable:
    """All allowed runs of at most `width` blocks whose load is at most `bound`."""

    costs: StageCosts
    bound: float
    width: int

    def loads(self, place: int) -> Floats:
        """[num_blocks, width]: entry [start, d] is the load of the run (start, start + 1 + d).

        Infinity for runs that are refused at the place.
        """
        blocks = self.costs.num_blocks
        starts = np.arange(blocks)[:, None]
        stops = starts + 1 + np.arange(self.width)[None, :]
        inside = stops <= blocks
        stops = np.minimum(stops, blocks)
        loads = self.costs.load(starts, stops, place)
        refused = ~inside | (loads > self.bound) | ~self.costs.is_allowed(starts, stops, place)
        loads = np.where(refused, np.inf, loads)
        for start, stop in self.costs.forbidden_runs:
            if stop - start <= self.width:
                loads[start, stop - start - 1] = np.inf
        return loads


def run_table(costs: StageCosts, bound: float, num_places: int) -> RunTable:
    """The table of all runs that may be a stage under the bound.

    Raises:
      ValueError: the table would exceed 2**24 entries.
    """
    width = longest_run(costs, bound, num_places)
    if max(width, num_places) * costs.num_blocks > _MOST_RUNS:
        raise ValueError(
            f"{costs.num_blocks} layers over {num_places} stages of up to {width} layers have too "
            "many cuts to search. Join layers by keep_together, or leave out either the cut times "
            "or the capacity."
        )
    return RunTable(costs, bound, width)


def least_totals(table: RunTable, num_places: int, combine: np.ufunc, power: int = 1) -> Search:
    """The least max or sum of load ** power for each number of stages up to `num_places`.

    If devices differ, a place may stay idle, and `totals[r]` is over the partitions into at most r
    stages.

    Args:
      table: the runs.
      num_places: the most stages.
      combine: np.maximum or np.add.
      power: exponent of the loads.
    """
    blocks = table.costs.num_blocks
    width = table.width
    best = np.full(blocks + width, np.inf)  # by start; padded so that every window is full
    best[blocks] = 0
    totals = np.full(num_places + 1, np.inf)
    choices = np.zeros((num_places, blocks + 1), dtype=np.int32)
    rows = np.arange(blocks)
    costs = None
    for place in range(num_places):
        if costs is None or not table.costs.is_uniform:
            costs = table.loads(place) ** power
        # [blocks, width]: the run (start, start + 1 + d), then the best partition from its stop.
        options = combine(costs, sliding_window_view(best[1:], width)[:blocks])
        widths = options.argmin(axis=1)
        found = options[rows, widths]
        widths = widths + 1
        if table.costs.may_idle:
            widths = np.where(best[:blocks] <= found, 0, widths)
            found = np.minimum(found, best[:blocks])
        else:
            best[blocks] = np.inf
        best[:blocks] = found
        totals[place + 1] = found[0]
        choices[place, :blocks] = widths
    return Search(totals, choices)


def longest_run(costs: StageCosts, bound: float, num_places: int) -> int:
    """An upper bound on the blocks of a stage, from the problem without cut times.

    Without cut times, sub-runs of runs that fit also fit, so a bisection finds the longest run.
    """
    costs = costs.without_cuts()
    stops = np.arange(1, costs.num_blocks + 1)
    if costs.is_uniform:
        return max(1, int((stops - uniform_starts(costs, bound)[1:]).max()))
    starts = (
        earliest_starts(
            stops, lambda start, stop, place=place: costs.fits(start, stop, bound, place)
        )
        for place in range(num_places)
    )
    return max(1, max(int((stops - start).max()) for start in starts))
