"""The microbatch is the largest that fits among those that fill the pipeline, and what is chosen
was compiled.
"""

import re
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

import layerwise_jax as lw
from layerwise_jax.cost.devices import CPU
from layerwise_jax.cost.layer_cost import LayerCost
from layerwise_jax.measure.layers import CompiledCosts
from layerwise_jax.measure.microbatch import (
    StagingChoices,
    between,
    choose_staging,
    roofline_seconds,
)
from layerwise_jax.partition.solver import CapacityError
from layerwise_jax.trace.layers import LayerSequence, trace_layers

WIDTH, DEPTH, EXAMPLES, STAGES = 32, 4, 32, 2
FLOAT = 4
WEIGHT_BYTES = WIDTH * WIDTH * FLOAT
ROW_BYTES = WIDTH * FLOAT
PARAMS = {
    f"layer_{i}": {"kernel": jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)}
    for i in range(DEPTH)
}


def run(params: Any, x: jax.Array) -> jax.Array:
    for i in range(DEPTH):
        x = jnp.sin(x @ params[f"layer_{i}"]["kernel"])
    return x


def examples(rows: int) -> jax.ShapeDtypeStruct:
    """64 rows an example, so that activations outweigh the weights."""
    return jax.ShapeDtypeStruct((rows, 64, WIDTH), jnp.float32)


@dataclass
class Tracer:
    """Traces the model, and remembers for how many examples it was asked to."""

    traced: list[int] = field(default_factory=list)

    def __call__(self, rows: int) -> LayerSequence:
        self.traced.append(rows)
        return trace_layers(run, PARAMS, examples(rows))


def choices(capacity: int | None, trace: Tracer | None = None, **changes: Any) -> StagingChoices:
    plain = StagingChoices(trace or Tracer(), EXAMPLES, STAGES, CPU, capacity, "dp")
    return replace(plain, **changes)


@pytest.mark.parametrize(
    ("num_examples", "num_stages", "wanted"),
    [
        (32, 2, [4, 8, 16, 32, 2, 1]),
        (12, 3, [12, 6, 4, 3, 2, 1]),
        (6, 8, [6, 3, 2, 1]),
        (5, 1, [1, 5]),
        (1, 4, [1]),
    ],
)
def test_the_fewest_microbatches_that_fill_the_pipeline_come_first(
    num_examples: int, num_stages: int, wanted: list[int]
) -> None:
    assert choices(None, num_examples=num_examples, num_stages=num_stages).counts() == wanted


@given(st.integers(1, 500), st.integers(1, 20))
def test_every_way_to_split_the_examples_is_considered_once(
    num_examples: int, num_stages: int
) -> None:
    counts = choices(None, num_examples=num_examples, num_stages=num_stages).counts()
    assert sorted(counts) == [m for m in range(1, num_examples + 1) if num_examples % m == 0]


def test_the_preferred_size_is_taken_where_it_fits_and_only_that_is_compiled() -> None:
    tracer = Tracer()
    staging = choose_staging(choices(10**9, tracer))
    assert staging.num_microbatches == 4
    assert tracer.traced == [EXAMPLES // 4]
    assert staging.partition.boundaries == (0, 2, 4)
    assert staging.stage_bytes == tuple(
        staging.gauge.stage_bytes(a, b) for a, b in staging.partition.stages
    )


def test_without_a_capacity_no_stage_is_compiled() -> None:
    staging = choose_staging(choices(None))
    assert staging.num_microbatches == 4
    assert staging.stage_bytes is None
    assert staging.gauge.num_compiles == 1


@pytest.mark.parametrize("fitting", [8, 16, 32])
def test_a_capacity_for_small_microbatches_only_finds_the_largest_of_them(fitting: int) -> None:
    # Two layers a stage; one byte less and the microbatch would have to be smaller.
    costs = choices(None).gauge(fitting).costs()
    capacity = max(costs[0].size + costs[1].size, costs[2].size + costs[3].size)
    tracer = Tracer()
    staging = choose_staging(choices(capacity, tracer))
    assert staging.num_microbatches == fitting
    # Sizes between the ends are predicted; what is chosen is compiled.
    assert tracer.traced == list(dict.fromkeys([EXAMPLES // 4, 1, EXAMPLES // fitting]))
    assert staging.stage_bytes is not None
    assert max(staging.stage_bytes) <= capacity
    with pytest.raises(CapacityError):
        choices(capacity).measured(fitting // 2)


def test_a_stage_larger_than_its_layers_promised_is_cut_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    capacity = 10**6
    asked: list[tuple[int, int]] = []

    def stage_bytes(self: CompiledCosts, start: int, stop: int) -> int:
        asked.append((start, stop))
        return capacity + 1 if (start, stop) == (0, 2) else capacity

    monkeypatch.setattr(CompiledCosts, "stage_bytes", stage_bytes)
    staging = choices(capacity).measured(8)
    assert asked[0] == (0, 2)
    assert staging.partition.boundaries in {(0, 1, 4), (0, 3, 4)}
    assert staging.stage_bytes == (capacity, capacity)
    assert (0, 2, capacity + 1) in staging.partition.measured


def test_greedy_aggregation_is_not_cut_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CompiledCosts, "stage_bytes", lambda *_: 10**6 + 1)
    with pytest.raises(CapacityError, match=r"1,000,001 bytes.*method='dp', which cuts again"):
        choices(10**6, method="greedy").measured(8)


def test_no_cut_whose_stages_all_fit_when_compiled_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(CompiledCosts, "stage_bytes", lambda *_: 10**7 + 1)
    tracer = Tracer()
    with pytest.raises(CapacityError):
        choose_staging(choices(10**7, tracer))
    assert sorted(tracer.traced) == [1, 2, 4, 8, 16, 32]


def test_what_cannot_fit_is_refused_after_compiling_two_sizes() -> None:
    tracer = Tracer()
    with pytest.raises(CapacityError):
        choose_staging(choices(WEIGHT_BYTES, tracer))
    assert tracer.traced == [EXAMPLES // 4, 1]


def refusal(capacity: int) -> str:
    with pytest.raises(CapacityError) as caught:
        lw.layerwise(run, PARAMS, examples(EXAMPLES), num_stages=STAGES, capacity=capacity)
    return str(caught.value)


def test_the_refusal_states_the_capacity_law() -> None:
    message = refusal(WEIGHT_BYTES - 1)
    assert f"{DEPTH * WEIGHT_BYTES:,} bytes of weights" in message
    # Four layers in float32 on devices that each hold a byte less than one.
    assert "Devices needed: 5 at fp32, 3 at fp16, 2 at fp8, 1 at 4 bits" in message
    assert message.endswith("tensor ways: 2 at fp32, 1 at fp16, 1 at fp8, 1 at 4 bits.")


def test_the_refusal_says_which_chunk_of_rows_would_fit() -> None:
    layer = choices(None).gauge(EXAMPLES).costs()[0]
    transient = layer.activation_bytes + layer.buffer_bytes
    assert transient >= 64 * ROW_BYTES
    room = transient // 3 + 1
    message = refusal(WEIGHT_BYTES + room)
    assert re.search(
        r"At one example a microbatch 'layer_\d' fits if its rows are run in 3 chunks\.", message
    )


SMALL = LayerCost("layer", 100, 10, 40, flops=8.0, bytes_accessed=20.0, peak_bytes=150)
LARGE = LayerCost("layer", 100, 30, 0, flops=24.0, bytes_accessed=60.0, peak_bytes=130)


def test_costs_between_two_microbatches_lie_on_a_line() -> None:
    assert between(SMALL, LARGE, 0) == SMALL
    assert between(SMALL, LARGE, 1) == LARGE
    assert between(SMALL, LARGE, 0.5) == LayerCost("layer", 100, 20, 20, 16.0, 40.0, 140)


def test_what_falls_as_the_microbatch_grows_does_not_fall_below_zero() -> None:
    assert between(SMALL, LARGE, 3).buffer_bytes == 0


def test_a_layer_takes_the_longer_of_computing_and_reading_and_a_boundary_its_bytes() -> None:
    layers = trace_layers(run, PARAMS, examples(2))
    device = CPU.updated(flops_per_second={"float32": 1e3}, l2_bandwidth=1e2, link_bandwidth=1e4)
    costs = [
        LayerCost(name, 10, 0, 0, flops=flops)
        for name, flops in zip(layers.names, (0, 50, 200, 0), strict=True)
    ]
    seconds, cut_seconds = roofline_seconds(layers, costs, device, scale=0.5)
    assert seconds == [0.1, 0.1, 0.2, 0.1]
    assert cut_seconds == [0.0, *[pytest.approx(0.5 * 2 * 64 * ROW_BYTES / 1e4)] * 3, 0.0]
