"""Metamorphic rules of the partitioner, the conditions of its fast method, and its certificates."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise_jax.partition.bottleneck import (
    bottleneck_search,
    bottleneck_solution,
    is_sweep_exact,
    searched_solution,
)
from layerwise_jax.partition.problem import make_problem
from layerwise_jax.partition.solver import CapacityError, Partition, solve
from layerwise_jax.partition.stage_costs import stage_costs
from layerwise_jax.partition.sweep import Optimum, least_bottleneck, prune_cuts

TIMES = st.lists(st.integers(0, 50), min_size=1, max_size=14)
STAGES = st.integers(1, 6)


def with_bytes(times):
    return st.tuples(
        st.just(times), st.lists(st.integers(0, 20), min_size=len(times), max_size=len(times))
    )


LAYERS = TIMES.flatmap(with_bytes)


def bottleneck(*args, **options):
    """The optimum, infinity where there is none."""
    try:
        return solve(*args, **options).bottleneck
    except CapacityError:
        return np.inf


def searched_optimum(costs, stages):
    """The bottleneck in units, by the search over all cuts."""
    table, search = bottleneck_search(costs, stages)
    return searched_solution(table, search, stages).lower_bound


def with_cuts(times):
    cuts = st.lists(st.integers(0, 30), min_size=len(times) - 1, max_size=len(times) - 1)
    return st.tuples(st.just(times), cuts.map(lambda inner: [0, *inner, 0]))


@given(LAYERS, STAGES, st.integers(-20, 20), st.integers(10, 60))
def test_scaling_the_times_scales_the_bottleneck(layers, stages, exponent, capacity):
    times, sizes = layers
    scale = 2.0**exponent
    before = bottleneck(times, sizes, max_stages=stages, capacity=capacity)
    after = bottleneck(np.multiply(times, scale), sizes, max_stages=stages, capacity=capacity)
    assert after == before * scale


@given(LAYERS, STAGES, st.integers(10, 60))
def test_reversal_changes_nothing(layers, stages, capacity):
    times, sizes = layers
    forward = bottleneck(times, None, sizes, max_stages=stages, capacity=capacity)
    assert (
        bottleneck(times[::-1], None, sizes[::-1], max_stages=stages, capacity=capacity) == forward
    )


@given(LAYERS, STAGES, st.integers(10, 60), st.integers(0, 1000))
def test_a_layer_split_in_two_never_raises_the_bottleneck(layers, stages, capacity, where):
    times, sizes = layers
    where %= len(times)

    def split(values):
        half = values[where] // 2
        return [*values[:where], half, values[where] - half, *values[where + 1 :]]

    before = bottleneck(times, sizes, max_stages=stages, capacity=capacity)
    assert bottleneck(split(times), split(sizes), max_stages=stages, capacity=capacity) <= before


@given(LAYERS, STAGES, st.integers(10, 60))
def test_more_stages_and_more_capacity_never_hurt(layers, stages, capacity):
    times, sizes = layers
    before = bottleneck(times, sizes, max_stages=stages, capacity=capacity)
    assert bottleneck(times, sizes, max_stages=stages + 1, capacity=capacity) <= before
    assert bottleneck(times, sizes, max_stages=stages, capacity=capacity + 7) <= before


@given(TIMES.flatmap(with_cuts), STAGES)
def test_cuts_only_cost(layers, stages):
    times, cuts = layers
    added = solve(times, None, None, cuts, max_stages=stages).bottleneck
    overlapped = solve(
        times, None, None, cuts, max_stages=stages, communication="overlap"
    ).bottleneck
    assert solve(times, None, max_stages=stages).bottleneck <= overlapped <= added


@given(TIMES.flatmap(with_cuts), STAGES)
def test_pruned_sweep_and_search_agree(layers, stages):
    times, cuts = layers
    costs = stage_costs(make_problem(times, None, None, cuts, max_stages=stages))
    assert bottleneck_solution(costs, stages).lower_bound == searched_optimum(costs, stages)
    assert (np.diff(prune_cuts(costs).cut + prune_cuts(costs).compute) >= 0).all()


@given(LAYERS, STAGES, st.integers(20, 60))
def test_sweep_and_search_agree_where_the_sweep_is_exact(layers, stages, capacity):
    times, sizes = layers
    costs = stage_costs(make_problem(times, None, sizes, max_stages=stages, capacity=capacity))
    assert is_sweep_exact(costs)
    swept = least_bottleneck(costs, stages)
    assert isinstance(swept, Optimum)
    assert swept.bound == searched_optimum(costs, stages)


def test_sweep_without_its_condition_is_wrong():
    """Taking all that fits stops at a boundary that is dear to cross; hence cuts are pruned, or all
    are searched.
    """
    costs = stage_costs(make_problem([2, 2, 2], None, None, [0, 0, 9, 0], max_stages=2))
    assert not is_sweep_exact(costs)
    swept = least_bottleneck(costs, 2)
    best = bottleneck_solution(costs, 2)
    assert isinstance(swept, Optimum)
    assert best.lower_bound < swept.bound


@given(LAYERS, STAGES, st.integers(20, 60))
def test_certificate_leaves_one_boundary_too_few(layers, stages, capacity):
    times, sizes = layers
    try:
        partition = solve(times, sizes, max_stages=stages, capacity=capacity)
    except CapacityError as error:
        check_infeasible(error, sizes, stages, capacity)
        return
    if not partition.certificate:
        assert partition.lower_bound in (max(times), sum(times) / stages)
        return
    assert len(partition.certificate) == stages
    for start, stop in partition.certificate:
        assert sum(times[start:stop]) >= partition.bottleneck or sum(sizes[start:stop]) > capacity
    check_runs_need_boundaries_of_their_own(partition.certificate)


def check_infeasible(error, sizes, stages, capacity):
    if error.layers is not None:
        assert sizes[error.layers[0]] == error.needed_bytes > capacity
        return
    assert all(sum(sizes[start:stop]) > capacity for start, stop in error.certificate)
    assert len(error.certificate) == stages
    check_runs_need_boundaries_of_their_own(error.certificate)
    solve([1] * len(sizes), sizes, max_stages=error.fewest_stages, capacity=capacity)
    assert error.fewest_stages > stages


def check_runs_need_boundaries_of_their_own(runs):
    inside = [set(range(start + 1, stop)) for start, stop in runs]
    assert all(inside)
    assert all(not first & second for first, second in itertools.combinations(inside, 2))


@given(LAYERS, STAGES, st.integers(20, 60))
def test_stages_are_even_where_nothing_forbids_it(layers, stages, capacity):
    times, sizes = layers
    if bottleneck(times, sizes, max_stages=stages, capacity=capacity) == np.inf:
        return
    partition = solve(times, sizes, max_stages=stages, capacity=capacity)
    assert partition.num_stages == min(stages, len(times))


@given(LAYERS, STAGES, st.integers(20, 60))
def test_a_partition_survives_json(layers, stages, capacity):
    times, sizes = layers
    partition = solve(times, sizes, max_stages=len(times), capacity=capacity)
    assert Partition.from_dict(json.loads(json.dumps(partition.to_dict()))) == partition


def test_equal_layers_make_equal_stages():
    assert solve([1] * 12, None, max_stages=4).boundaries == (0, 3, 6, 9, 12)
    assert solve([0] * 3, None, max_stages=3).boundaries == (0, 1, 2, 3)


def test_freedom_under_the_bottleneck_is_spread_evenly():
    partition = solve([9, 1, 1, 1, 1, 1, 1], None, max_stages=3)
    assert partition.stage_loads == (9, 3, 3)


@pytest.mark.parametrize("entry", ["boundaries", "proof"])
def test_a_dictionary_without_an_entry_is_refused(entry):
    values = solve([1, 2], None, max_stages=2).to_dict()
    del values[entry]
    with pytest.raises(ValueError, match=entry):
        Partition.from_dict(values)


def test_a_dictionary_that_contradicts_itself_is_refused():
    values = solve([1, 2], None, max_stages=2).to_dict()
    with pytest.raises(ValueError, match="increasing"):
        Partition.from_dict(values | {"boundaries": [0, 2, 2]})
    with pytest.raises(ValueError, match=r"stage_loads must have . entries"):
        Partition.from_dict(values | {"stage_loads": [3.0]})
