"""experiments/partition: the rivals return partitions, and the claims of its table hold."""

import itertools

import numpy as np
import pytest

from experiments.partition.balancers import structures
from experiments.partition.picture import LayerFigures, draw_stages, stagings
from experiments.partition.rivals import block_partition, bottleneck_of, even_by_count, least_spread
from layerwise_jax.partition.solver import solve

RIVALS = [even_by_count, block_partition, least_spread]


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("seed", range(20))
def test_no_rival_beats_the_optimum(rival, seed):
    draw = np.random.default_rng(seed)
    layers = int(draw.integers(2, 30))
    stages = int(draw.integers(1, layers + 1))
    times = draw.integers(1, 20, size=layers).astype(float)
    boundaries = rival(times, stages)
    assert len(boundaries) == stages + 1
    assert boundaries[0] == 0
    assert boundaries[-1] == layers
    assert list(boundaries) == sorted(boundaries)
    assert bottleneck_of(times, boundaries) >= solve(times, None, max_stages=stages).bottleneck


def test_blocks_of_the_block_partition_differ_by_one_element_at_most():
    """Its theorem, where the smallest element is 0, so that mapping to [0, 1] changes no
    proportion.
    """
    times = np.append(np.random.default_rng(0).random(60), 0.0)
    boundaries = block_partition(times, 7)
    loads = [times[start:stop].sum() for start, stop in itertools.pairwise(boundaries)]
    assert max(loads) - min(loads) <= times.max() + 1e-9


def test_block_partition_is_far_off_on_63_equal_layers():
    assert bottleneck_of(np.ones(63), block_partition(np.ones(63), 32)) == 32
    assert solve(np.ones(63), None, max_stages=32).bottleneck == 2


@pytest.mark.parametrize(
    ("layers", "stages", "structure"),
    [
        (100_000, 10_000, "balance only"),
        (100_000, 10_000, "capacity"),
        (1000, 64, "cut costs"),
        (1000, 64, "capacity and cut costs"),
    ],
)
def test_large_problems_are_solved_to_the_optimum(layers, stages, structure):
    """A method of quadratic cost would not end within the runner's limit."""
    assert solve(**structures(layers, stages)[structure]).is_optimal


def test_a_picture_is_drawn(tmp_path):
    layers = [LayerFigures(f"layer {index}", 1.0 + index % 3, 10.0) for index in range(12)]
    assert draw_stages(layers, 4, 40.0, tmp_path / "stages.png").stat().st_size > 1000


def test_a_method_without_a_partition_says_why():
    layers = [LayerFigures(f"layer {index}", 1.0, 10.0) for index in range(4)]
    found = stagings(layers, 2, 15.0)
    assert "4 stages would do" in found["dp"]
    assert found["even by count"] == [0, 2, 4]
