"""Fast method: a sweep from the end in which each stage takes as many blocks as fit under a bound.

A sweep is exact if every sub-run of a run that fits a place also fits that place. Induction: if no
partition reaches further than boundary g with its last r stages, then its stage before them, cut
short to stop at g, still fits, and the sweep's own stage goes at least as far. So the sweep uses
the fewest stages.

The condition holds for sums of weights, maxima of transients, tied weights, soft capacities and
layers kept apart, and for memory and speed that depend on the place: a sweep from the end knows the
place, so each place needs the condition for itself only. It fails where boundaries cost time,
unless `prune_cuts` applies, and where measured runs are forbidden. Where devices differ, a sweep
may leave one idle, so it cannot give an exact number of stages. `search` solves those problems.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from layerwise_jax.partition.stage_costs import Indices, StageCosts, earliest_starts


@dataclass(frozen=True, eq=False)
class Sweep:
    """One sweep under a bound.

    Attributes:
      reached: block boundaries of the stages from the end down.
      next_bound: smallest load of a stage with one more block, among those that only the load
        refuses. No bound below it gives another sweep, so a sweep that fails proves that no
        partition is better than `next_bound`.
    """

    reached: Indices
    next_bound: float

    @property
    def is_complete(self) -> bool:
        """True if the stages reach the first block."""
        return self.reached[-1] == 0


@dataclass(frozen=True, eq=False)
class Optimum:
    """Result of `least_bottleneck`.

    Attributes:
      bound: the smallest bound under which a sweep completes.
      complete: that sweep.
      failed: the last sweep that failed; None if `bound` is the initial lower bound.
    """

    bound: float
    complete: Sweep
    failed: Sweep | None


def prune_cuts(costs: StageCosts) -> StageCosts:
    """Drops boundaries that another one dominates, so that a sweep is exact with cut times.

    A run loads its stage with finish(stop) - begin(start), where finish = compute + cut and begin =
    compute - cut. Moving a cut to a boundary with a smaller finish and a larger begin lightens both
    its sides. Along the boundaries that no other dominates neither finish nor begin decreases, so
    every sub-run of a run under a bound is under it. (Where an end dominates, a stage becomes
    empty.) Holds only where nothing but the load limits a stage: a cut that moves also moves bytes.
    """
    finish, begin = costs.compute + costs.cut, costs.compute - costs.cut
    # A later boundary dominates if it lowers `finish`; then it raises `begin` too. Mirrored for
    # earlier ones.
    least_from = np.minimum.accumulate(finish[::-1])[::-1]
    most_until = np.maximum.accumulate(begin)
    return costs.at(np.flatnonzero((finish <= least_from) & (begin >= most_until)))


def least_bottleneck(costs: StageCosts, max_stages: int) -> Optimum | Sweep:
    """The smallest bottleneck over at most `max_stages` stages.

    Returns the failed sweep if not even an infinite bound suffices. The bisection is exact: a sweep
    that completes lowers the upper end to its own largest load, and one that fails raises the lower
    end to its `next_bound`.
    """
    complete = sweep(costs, np.inf, max_stages)
    if not complete.is_complete:
        return complete
    low = lower_bound(costs, max_stages)
    high = largest_load(costs, complete)
    failed = None
    bound = low
    while low < high:
        attempt = sweep(costs, bound, max_stages)
        if attempt.is_complete:
            complete = attempt
            high = largest_load(costs, attempt)
        else:
            failed = attempt
            low = attempt.next_bound
        bound = (low + high) / 2
        bound = low if bound >= high else bound
    return Optimum(high, complete, failed)


def lower_bound(costs: StageCosts, max_stages: int) -> float:
    """Lower bound on the bottleneck: the mean load, or the heaviest block at the fastest place."""
    speed = costs.by_place[1][:max_stages]
    return float(max(costs.heaviest_block / speed.max(), costs.compute[-1] / speed.sum()))


def sweep(costs: StageCosts, bound: float, max_stages: int) -> Sweep:
    """Sweeps from the end with stages as long as the bound allows; a place may stay idle."""
    start_of = _stepper(costs, bound)
    reached = [costs.num_blocks]
    while reached[-1] > 0 and len(reached) <= max_stages:
        reached.append(start_of(len(reached) - 1, reached[-1]))
    boundaries = np.asarray(reached, dtype=np.int64)
    return Sweep(boundaries, _next_bound(costs, boundaries))


def largest_load(costs: StageCosts, attempt: Sweep) -> float:
    """The largest load of a sweep's stages, in units."""
    starts, stops = attempt.reached[1:], attempt.reached[:-1]
    places = np.flatnonzero(starts < stops)
    return float(costs.load(starts[places], stops[places], places).max())


def _next_bound(costs: StageCosts, reached: Indices) -> float:
    places = np.flatnonzero(reached[1:] > 0)
    starts, stops = reached[1:][places] - 1, reached[:-1][places]
    allowed = costs.is_allowed(starts, stops, places)
    return float(costs.load(starts, stops, places)[allowed].min(initial=np.inf))


def _stepper(costs: StageCosts, bound: float) -> Callable[[int, int], int]:
    """The function (place, stop) -> smallest start of a stage under the bound."""
    if costs.is_uniform:
        starts = uniform_starts(costs, bound).tolist()
        return lambda place, stop: starts[stop]

    def start_of(place: int, stop: int) -> int:
        return bisect_left(
            range(stop), True, key=lambda start: bool(costs.fits(start, stop, bound, place))
        )

    return start_of


def uniform_starts(costs: StageCosts, bound: float) -> Indices:
    """[num_blocks + 1], smallest start of a stage under the bound by stop, if places are equal."""
    stops = np.arange(1, costs.num_blocks + 1)
    if costs.is_additive:
        # Units are ints, so the subtraction is exact and one sorted search answers all stops.
        starts = np.searchsorted(
            costs.compute - costs.cut, costs.compute[1:] + costs.cut[1:] - bound
        )
        starts = np.minimum(np.maximum(starts, costs.allowed_starts), stops)
    else:
        starts = earliest_starts(stops, lambda start, stop: costs.fits(start, stop, bound))
    return np.concatenate([[0], starts])
