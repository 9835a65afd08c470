"""Optimal solution of a problem: fewest stages and makespans are reduced to bottlenecks."""

from dataclasses import replace

import numpy as np

from layerwise_jax.partition.bottleneck import (
    answers,
    are_cuts_prunable,
    bottleneck_solution,
    is_sweep_exact,
    largest_conceivable_load,
)
from layerwise_jax.partition.certificate import fewest_stages, refuse
from layerwise_jax.partition.search import least_totals, run_table
from layerwise_jax.partition.solution import Solution, objective_value
from layerwise_jax.partition.stage_costs import StageCosts
from layerwise_jax.partition.sweep import lower_bound, prune_cuts, sweep

_EVERY_COUNT = "every number of stages was solved or bounded."
_EVERY_BOUND = "the least sum of loads was searched under every bottleneck that could win."


def optimal_solution(costs: StageCosts) -> Solution:
    """The best solution by the problem's objective.

    Raises:
      CapacityError: no partition satisfies the constraints.
    """
    num_stages = costs.problem.max_stages
    if costs.problem.objective == "stages":
        return fewest_stages_solution(costs)
    if costs.problem.objective == "lockstep_makespan":
        return lockstep_solution(costs)
    solution = bottleneck_solution(costs, num_stages)
    return makespan_solution(costs, solution) if costs.problem.objective == "makespan" else solution


def fewest_stages_solution(costs: StageCosts) -> Solution:
    """The fewest stages that fit, and with that count the smallest bottleneck."""
    most = costs.problem.max_stages
    fewest = fewest_stages(costs)
    if fewest is None or fewest > most:
        refuse(costs, sweep(costs, np.inf, most), most)
    if not costs.forbidden_runs:
        return bottleneck_solution(costs, fewest)
    table = run_table(costs, largest_conceivable_load(costs, most), most)
    counts = np.flatnonzero(np.isfinite(least_totals(table, most, np.maximum).totals))
    return bottleneck_solution(costs, int(counts[0])) if len(counts) else refuse(costs, None, most)


def lockstep_solution(costs: StageCosts) -> Solution:
    """The smallest (microbatches - 1 + stages) * bottleneck, the time of stages in lockstep."""
    most = costs.problem.max_stages
    solution = bottleneck_solution(costs, most)
    if costs.problem.exactly or costs.may_idle:
        best = solution
    elif is_sweep_exact(costs) or are_cuts_prunable(costs):
        best = _swept_lockstep(costs, solution)
    else:
        best = _searched_lockstep(costs, solution)
    return replace(best, lower_bound=objective_value(costs, best.loads))


def _swept_lockstep(costs: StageCosts, best: Solution) -> Solution:
    """Solves each number of stages by sweeps, in the order of their lower bounds.

    Stops at the first bound that is no better than the best solution.
    """
    extra = costs.problem.num_microbatches - 1
    fewest = fewest_stages(costs)
    assert fewest is not None
    bounds = {
        count: (extra + count) * lower_bound(costs, count)
        for count in range(fewest, costs.problem.max_stages + 1)
    }
    for count in sorted(bounds, key=bounds.__getitem__):
        if bounds[count] >= objective_value(costs, best.loads):
            break
        best = _better(costs, best, bottleneck_solution(costs, count))
    return replace(best, failed=None, proof=_EVERY_COUNT)


def _searched_lockstep(costs: StageCosts, best: Solution) -> Solution:
    """Finds the smallest bottleneck of every number of stages by one search."""
    # A bottleneck above value / (extra + 1) cannot beat the value, even with one stage.
    most = costs.problem.max_stages
    extra = costs.problem.num_microbatches - 1
    table = run_table(costs, objective_value(costs, best.loads) / (extra + 1), most)
    totals = least_totals(table, most, np.maximum).totals
    count = 1 + int(((extra + np.arange(1, most + 1)) * totals[1:]).argmin())
    evened = least_totals(replace(table, bound=totals[count]), most, np.add, power=2)
    return replace(
        _better(costs, best, Solution(costs, evened.boundaries(count), 0.0)), proof=_EVERY_COUNT
    )


def makespan_solution(costs: StageCosts, solution: Solution) -> Solution:
    """The smallest sum of loads + (microbatches - 1) * bottleneck, the time of free-running stages.

    If the sum is the same for every partition, the smallest bottleneck is optimal. Otherwise the
    bound on the bottleneck descends from the highest that could win. Each step takes the smallest
    sum under the bound, until no lower bound can win.
    """
    if costs.has_fixed_total:
        return replace(solution, lower_bound=objective_value(costs, solution.loads))
    costs = prune_cuts(costs) if are_cuts_prunable(costs) else costs
    extra = costs.problem.num_microbatches - 1
    most = costs.problem.max_stages
    least_bottleneck = solution.lower_bound
    best = solution
    least_sum = 0.0
    bound = largest_conceivable_load(costs, most)
    while bound >= least_bottleneck:
        value = objective_value(costs, best.loads)
        bound = min(bound, value - least_sum if extra == 0 else (value - least_sum) / extra)
        search = least_totals(run_table(costs, bound, most), most, np.add)
        totals = answers(costs, search.totals)
        least_sum = float(totals.min())
        if least_sum + extra * least_bottleneck >= value:
            break
        found = Solution(costs, search.boundaries(int(totals.argmin())), 0.0)
        best = _better(costs, best, found)
        bound = np.nextafter(found.loads.max(), -np.inf)
    return replace(
        best, lower_bound=objective_value(costs, best.loads), failed=None, proof=_EVERY_BOUND
    )


def _better(costs: StageCosts, first: Solution, second: Solution) -> Solution:
    return (
        second
        if objective_value(costs, second.loads) < objective_value(costs, first.loads)
        else first
    )
