"""The optimum is the optimum: brute force over all cuts agrees, over all objectives and cost
structures.
"""

import pytest

from layerwise_jax.partition.solver import CapacityError, solve
from tests.support.partition_instances import random_instance
from tests.support.partition_oracle import INFEASIBLE, best_value, differs, partitions, value_of

CHUNK = 100


def check_against_brute_force(seed):
    instance = random_instance(seed)
    if instance["objective"] == "stages" and differs(instance):
        with pytest.raises(ValueError, match="devices"):
            solve(**instance)
        return
    if instance.get("exactly") and _num_blocks(instance) < instance["max_stages"]:
        with pytest.raises(ValueError, match="exactly"):
            solve(**instance)
        return
    wanted = best_value(instance)
    if wanted == INFEASIBLE:
        with pytest.raises(CapacityError):
            solve(**instance)
        return
    partition = solve(**instance)
    found = (
        (partition.num_stages, partition.bottleneck) if instance["objective"] == "stages" else None
    )
    assert (found or partition.objective_value) == pytest.approx(wanted, rel=1e-12, abs=1e-12), (
        instance
    )
    assert partition.is_optimal
    assert any(
        boundaries == partition.boundaries
        and value_of(instance, loads) == pytest.approx(wanted, rel=1e-12, abs=1e-12)
        for boundaries, loads in partitions(instance)
    ), instance


def _num_blocks(instance):
    groups = instance.get("keep_together", ())
    joined = {boundary for first, last in groups for boundary in range(first + 1, last + 1)}
    return len(instance["seconds"]) - len(joined)


@pytest.mark.parametrize("chunk", range(10))
def test_brute_force_agrees(chunk):
    for seed in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        check_against_brute_force(seed)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(10, 110))
def test_brute_force_agrees_at_length(chunk):
    for seed in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        check_against_brute_force(seed)
