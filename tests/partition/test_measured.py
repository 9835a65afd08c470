"""Memory that only a measurement knows: verify, forbid, solve again, against brute force over
measured partitions.
"""

import itertools

import numpy as np
import pytest

from layerwise_jax.partition.measured import verified_partition
from layerwise_jax.partition.problem import make_problem
from layerwise_jax.partition.solver import CapacityError, solve_measured


def measured_sizes(draw, layers):
    """Bytes of every run, at random: a longer run may well need less."""
    runs = itertools.combinations(range(layers + 1), 2)
    return {run: float(draw.integers(1, 20)) for run in runs}


def best_measured(times, sizes, stages, capacity):
    best = np.inf
    for count in range(1, min(stages, len(times)) + 1):
        for inner in itertools.combinations(range(1, len(times)), count - 1):
            boundaries = (0, *inner, len(times))
            runs = list(itertools.pairwise(boundaries))
            if all(sizes[run] <= capacity for run in runs):
                best = min(best, max(sum(times[start:stop]) for start, stop in runs))
    return best


@pytest.mark.parametrize("seed", range(200))
def test_measured_optimum_agrees_with_brute_force(seed):
    draw = np.random.default_rng(seed)
    layers, stages, capacity = (
        int(draw.integers(1, 8)),
        int(draw.integers(1, 5)),
        int(draw.integers(4, 16)),
    )
    times, sizes = draw.integers(1, 10, size=layers).tolist(), measured_sizes(draw, layers)
    calls = []

    def measure(start, stop):
        calls.append((start, stop))
        return sizes[start, stop]

    wanted = best_measured(times, sizes, stages, capacity)
    if wanted == np.inf:
        with pytest.raises(CapacityError) as caught:
            solve_measured(measure, times, max_stages=stages, capacity=capacity)
        check_no_partition_avoids(caught.value.certificate, layers, stages)
        assert all(sizes[run] > capacity for run in caught.value.certificate)
    else:
        partition = solve_measured(measure, times, max_stages=stages, capacity=capacity)
        assert partition.bottleneck == wanted
        assert partition.stage_bytes == tuple(sizes[run] for run in partition.stages)
        assert max(partition.stage_bytes) <= capacity
        assert {run[:2]: run[2] for run in partition.measured} == {run: sizes[run] for run in calls}
    assert len(calls) == len(set(calls))


def check_no_partition_avoids(forbidden, layers, stages):
    """The proof, checked: every partition into at most so many stages has one of the forbidden
    runs.
    """
    for count in range(1, min(stages, layers) + 1):
        for inner in itertools.combinations(range(1, layers), count - 1):
            assert set(itertools.pairwise((0, *inner, layers))) & set(forbidden)


def test_fewest_stages_by_measurement():
    sizes = {(0, 1): 5, (1, 2): 5, (2, 3): 5, (0, 2): 12, (1, 3): 9, (0, 3): 14}
    partition = solve_measured(lambda *run: sizes[run], [1, 1, 1], objective="stages", capacity=10)
    assert partition.boundaries == (0, 1, 3)
    assert partition.fewest_stages == 2


def test_sizes_that_are_certain_save_measurements():
    calls = []

    def measure(start, stop):
        calls.append((start, stop))
        return 6.0 * (stop - start)

    solve_measured(measure, [1] * 6, [4] * 6, max_stages=6, objective="bottleneck", capacity=6)
    assert sorted(calls) == [(layer, layer + 1) for layer in range(6)]


def test_the_limit_on_measurements_ends_the_search():
    with pytest.raises(RuntimeError, match="3 stages were measured"):
        solve_measured(
            lambda start, stop: 100.0, [1] * 9, max_stages=3, capacity=10, max_measurements=3
        )


@pytest.mark.parametrize("size", [np.nan, -1.0, np.inf])
def test_a_measurement_that_is_no_size_is_refused(size):
    with pytest.raises(ValueError, match=r"measure must return .* layers 0\.\.0"):
        solve_measured(lambda start, stop: size, [1], max_stages=1, capacity=10)


@pytest.mark.parametrize("capacity", [None, [5, 6]])
def test_one_capacity_is_wanted(capacity):
    problem = make_problem([1, 1], None, max_stages=2, capacity=capacity)
    with pytest.raises(ValueError, match="one hard capacity"):
        verified_partition(problem, lambda start, stop: 1.0)
