"""The smallest bottleneck: which method is exact for the problem at hand, and what it proves."""

import numpy as np

from layerwise_jax.partition.certificate import refuse
from layerwise_jax.partition.checks import Floats
from layerwise_jax.partition.evenness import even_boundaries
from layerwise_jax.partition.search import RunTable, Search, least_totals, longest_run, run_table
from layerwise_jax.partition.solution import Solution
from layerwise_jax.partition.stage_costs import Indices, StageCosts
from layerwise_jax.partition.sweep import Optimum, least_bottleneck, prune_cuts

# Up to so many steps (a fraction of a second) the evenest optimum is searched; beyond, an even one
# is walked to.
_EVENED_BY_SEARCH = 10**7


def is_sweep_exact(costs: StageCosts) -> bool:
    """Whether sub-runs of runs that fit always fit, and any number of stages from the fewest up can
    be had.

    Exactly as many stages as devices that differ is the exception: the sweep may have to leave one
    of them idle.
    """
    counts_are_free = costs.is_uniform or not costs.problem.exactly
    return not costs.has_cuts and not costs.forbidden_runs and counts_are_free


def are_cuts_prunable(costs: StageCosts) -> bool:
    """Whether nothing but an additive load limits a stage; then a sweep is exact on what
    `prune_cuts` leaves.
    """
    return costs.is_additive and not (
        costs.has_limit or costs.forbidden_runs or costs.problem.exactly
    )


def bottleneck_plan(costs: StageCosts, num_stages: int) -> Solution:
    """The smallest largest load over at most (or exactly, if the problem says so) `num_stages`
    stages.

    Raises:
        CapacityError: no partition satisfies the constraints.
    """
    if is_sweep_exact(costs):
        return _sweep_plan(costs, num_stages)
    if are_cuts_prunable(costs):
        return _sweep_plan(prune_cuts(costs), num_stages)
    return search_plan(*bottleneck_search(costs, num_stages), num_stages)


def _sweep_plan(costs: StageCosts, num_stages: int) -> Solution:
    optimum = swept_optimum(costs, num_stages)
    width = longest_run(costs, optimum.bound, num_stages)
    if costs.num_blocks * width * num_stages <= _EVENED_BY_SEARCH:
        boundaries = evenest_boundaries(RunTable(costs, optimum.bound, width), num_stages)
    else:
        boundaries = swept_boundaries(costs, optimum, num_stages)
    return Solution(costs, boundaries, optimum.bound, optimum.failed, "")


def swept_optimum(costs: StageCosts, num_stages: int) -> Optimum:
    """The optimum by sweeps, or the error that says which layers or how many stages are in the
    way.
    """
    found = least_bottleneck(costs, num_stages)
    return found if isinstance(found, Optimum) else refuse(costs, found, num_stages)


def swept_boundaries(costs: StageCosts, optimum: Optimum, num_stages: int) -> Indices:
    """Fairly even stages under the optimum, in one walk; more than it takes only where boundaries
    cost nothing.
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
    """The search over all cuts under the smallest bound that is sure to hold the optimum, or grown
    until it does.

    Leaving out the cuts, the count and the forbidden runs gives a lower bound, and boundaries whose
    load with everything in is an upper bound on the optimum, unless what was left out refuses them.
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


def search_plan(table: RunTable, search: Search, num_stages: int) -> Solution:
    """Of the partitions with the smallest bottleneck, the evenest."""
    optimum = float(answers(table.costs, search.totals).min())
    under = RunTable(table.costs, optimum, table.width)
    return Solution(table.costs, evenest_boundaries(under, num_stages), optimum)


def evenest_boundaries(table: RunTable, num_stages: int) -> Indices:
    """The partition with the smallest sum of squared loads; among those the one with the most
    stages.
    """
    evened = least_totals(table, num_stages, np.add, power=2)
    totals = answers(table.costs, evened.totals)
    return evened.boundaries(num_stages - int(totals[::-1].argmin()))


def answers(costs: StageCosts, totals: Floats) -> Floats:
    """The totals for the numbers of stages that the problem accepts; infinity for the others."""
    accepted = totals.copy()
    if costs.problem.exactly:
        accepted[:-1] = np.inf
    return accepted


def largest_conceivable_load(costs: StageCosts, num_stages: int) -> float:
    """A load that no run exceeds."""
    places = np.arange(num_stages)
    return float(costs.without_cuts().load(0, costs.num_blocks, places).max() + 2 * costs.cut.max())
