"""Smallest bottleneck: chooses a method that is exact for the problem, and returns its proof."""

import numpy as np

from layerwise_jax.partition.certificate import refuse
from layerwise_jax.partition.checks import Floats
from layerwise_jax.partition.evenness import even_boundaries
from layerwise_jax.partition.search import RunTable, Search, least_totals, longest_run, run_table
from layerwise_jax.partition.solution import Solution
from layerwise_jax.partition.stage_costs import Indices, StageCosts
from layerwise_jax.partition.sweep import Optimum, least_bottleneck, prune_cuts

# Most steps (a fraction of a second) of the search for the evenest optimum; larger problems take
# the walk of `evenness`.
_EVENED_BY_SEARCH = 10**7


def is_sweep_exact(costs: StageCosts) -> bool:
    """True if a sweep is exact: every sub-run of a run that fits also fits.

    False as well for exactly as many stages as unequal devices, since a sweep may leave one idle.
    """
    counts_are_free = costs.is_uniform or not costs.problem.exactly
    return not costs.has_cuts and not costs.forbidden_runs and counts_are_free


def are_cuts_prunable(costs: StageCosts) -> bool:
    """True if only an additive load limits stages; a sweep is then exact after `prune_cuts`."""
    return costs.is_additive and not (
        costs.has_limit or costs.forbidden_runs or costs.problem.exactly
    )


def bottleneck_solution(costs: StageCosts, num_stages: int) -> Solution:
    """The partition with the smallest bottleneck over at most, or exactly, `num_stages` stages.

    Raises:
      CapacityError: no partition satisfies the constraints.
    """
    if is_sweep_exact(costs):
        return _swept_solution(costs, num_stages)
    if are_cuts_prunable(costs):
        return _swept_solution(prune_cuts(costs), num_stages)
    return searched_solution(*bottleneck_search(costs, num_stages), num_stages)


def _swept_solution(costs: StageCosts, num_stages: int) -> Solution:
    optimum = swept_optimum(costs, num_stages)
    width = longest_run(costs, optimum.bound, num_stages)
    if costs.num_blocks * width * num_stages <= _EVENED_BY_SEARCH:
        boundaries = evenest_boundaries(RunTable(costs, optimum.bound, width), num_stages)
    else:
        boundaries = swept_boundaries(costs, optimum, num_stages)
    return Solution(costs, boundaries, optimum.bound, optimum.failed, "")


def swept_optimum(costs: StageCosts, num_stages: int) -> Optimum:
    """The smallest bottleneck by sweeps.

    Raises:
      CapacityError: no partition satisfies the constraints; names layers or the stage count.
    """
    found = least_bottleneck(costs, num_stages)
    return found if isinstance(found, Optimum) else refuse(costs, found, num_stages)


def swept_boundaries(costs: StageCosts, optimum: Optimum, num_stages: int) -> Indices:
    """Boundaries of fairly even stages under the optimal bound, by one walk.

    Uses all `num_stages` stages if boundaries cost nothing, otherwise as many as the sweep.
    """
    count = (
        min(num_stages, costs.num_blocks)
        if not costs.has_cuts
        else len(optimum.complete.reached) - 1
    )
    if not costs.is_uniform:
        count = num_stages
    boundaries = even_boundaries(costs, optimum.bound, optimum.complete.reached, count)
    return boundaries if costs.may_idle else np.unique(boundaries)


def bottleneck_search(costs: StageCosts, num_stages: int) -> tuple[RunTable, Search]:
    """Search over all cuts under a bound that contains the optimum.

    The relaxation without cut times, exact count and forbidden runs gives boundaries. Their load
    with everything included is an upper bound, unless a relaxed constraint refuses them; the bound
    then doubles until some partition is found.

    Raises:
      CapacityError: no partition satisfies the constraints.
    """
    relaxed = costs.without_cuts()
    optimum = swept_optimum(relaxed, num_stages)
    guess = Solution(costs, swept_boundaries(relaxed, optimum, num_stages), optimum.bound)
    bound, most = float(guess.loads.max()), largest_conceivable_load(costs, num_stages)
    while True:
        table = run_table(costs, bound, num_stages)
        search = least_totals(table, num_stages, np.maximum)
        if np.isfinite(answers(costs, search.totals)).any():
            return table, search
        if bound >= most:
            return refuse(costs, None, num_stages)
        bound = min(2 * bound if bound > 0 else most, most)


def searched_solution(table: RunTable, search: Search, num_stages: int) -> Solution:
    """The evenest of the partitions with the smallest bottleneck."""
    optimum = float(answers(table.costs, search.totals).min())
    under = RunTable(table.costs, optimum, table.width)
    return Solution(table.costs, evenest_boundaries(under, num_stages), optimum)


def evenest_boundaries(table: RunTable, num_stages: int) -> Indices:
    """Boundaries with the smallest sum of squared loads, and of those with the most stages."""
    evened = least_totals(table, num_stages, np.add, power=2)
    totals = answers(table.costs, evened.totals)
    return evened.boundaries(num_stages - int(totals[::-1].argmin()))


def answers(costs: StageCosts, totals: Floats) -> Floats:
    """`totals` by number of stages, with infinity for counts that the problem does not accept."""
    accepted = totals.copy()
    if costs.problem.exactly:
        accepted[:-1] = np.inf
    return accepted


def largest_conceivable_load(costs: StageCosts, num_stages: int) -> float:
    """An upper bound on the load of any run: all layers in the slowest place, plus two cuts."""
    places = np.arange(num_stages)
    return float(costs.without_cuts().load(0, costs.num_blocks, places).max() + 2 * costs.cut.max())
