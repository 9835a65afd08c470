"""Costs add as the paper's sizes do, and what is no number is refused by name."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise_jax.cost.layer_cost import LayerCost, total

SIZES = [field.name for field in dataclasses.fields(LayerCost) if field.name != "name"]

counts = st.integers(0, 2**48)
costs = st.builds(LayerCost, st.text(max_size=3), counts, counts, counts, counts, counts, counts)


def numbers(cost: LayerCost) -> tuple[float, ...]:
    return tuple(getattr(cost, name) for name in SIZES)


def test_size_is_the_sum_of_the_three():
    assert (
        LayerCost("dense", weight_bytes=100, activation_bytes=20, buffer_bytes=3, flops=7e9).size
        == 123
    )


def test_a_sum_adds_work_and_takes_the_larger_peak():
    a = LayerCost("a", 1, 2, 3, flops=4, bytes_accessed=5, peak_bytes=60)
    b = LayerCost("b", 10, 20, 30, flops=40, bytes_accessed=50, peak_bytes=6)
    assert a + b == LayerCost("a + b", 11, 22, 33, flops=44, bytes_accessed=55, peak_bytes=60)


def test_repeating_repeats_work_alone():
    layer = LayerCost("a", 1, 2, 3, flops=4, bytes_accessed=5, peak_bytes=6)
    assert layer * 3 == LayerCost("a x 3", 1, 2, 3, flops=12, bytes_accessed=15, peak_bytes=6)


@given(costs, costs, costs)
def test_sums_do_not_depend_on_order(a, b, c):
    assert numbers((a + b) + c) == numbers(a + (b + c)) == numbers(c + b + a)


@given(st.lists(costs, min_size=1, max_size=5))
def test_total_sizes_add(many):
    assert total(many).size == sum(cost.size for cost in many)
    assert total(iter(many)) == total(many)


def test_the_total_of_none_is_refused():
    with pytest.raises(ValueError, match="must have at least one LayerCost"):
        total([])


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("wrong", [-1, math.nan, math.inf])
def test_what_is_no_size_is_refused_by_name(name, wrong):
    with pytest.raises(
        ValueError, match=(f"{name} of layer 'dense' must be finite and at least 0, got {wrong}")
    ):
        dataclasses.replace(LayerCost("dense", 1, 1, 1), **{name: wrong})
