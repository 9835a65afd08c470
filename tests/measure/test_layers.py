"""Layer costs: counted by hand, and read from programs compiled for a local or an absent device."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from layerwise_jax.cost.capacity import capacity_bound
from layerwise_jax.cost.device import DeviceSpec
from layerwise_jax.cost.devices import CPU, H100
from layerwise_jax.cost.layer_cost import total
from layerwise_jax.measure import layers as measure
from layerwise_jax.measure.layers import CompiledCosts, measure_costs, measured_by_shape
from layerwise_jax.partition.solver import CapacityError, partition_layers
from layerwise_jax.trace.layers import LayerSequence, trace_layers
from layerwise_jax.xla.aot import can_compile_for_absent_gpus

ABSENT = pytest.param(
    H100,
    marks=pytest.mark.skipif(
        not can_compile_for_absent_gpus(), reason="the CUDA plugin (extra aot) is not importable"
    ),
    id="absent H100",
)
LOCAL = pytest.param(None, id="local")

ROWS, WIDTH, DEPTH = 8, 64, 4
FLOAT, HALF = 4, 2  # bytes
MLP_BYTES = 2 * WIDTH * 4 * WIDTH * FLOAT


def shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def mlp(weights: Any, x: jax.Array) -> jax.Array:
    return x + jax.nn.relu(x @ weights["up"]) @ weights["down"]


def stack(depth: int = DEPTH, rows: int = ROWS) -> LayerSequence:
    """Equal MLPs, then a head of another shape."""

    def run(params: Any, x: jax.Array) -> jax.Array:
        for i in range(depth):
            x = mlp(params[f"mlp_{i}"], x)
        return x @ params["head"]["kernel"]

    mlps = {
        f"mlp_{i}": {"up": shape(WIDTH, 4 * WIDTH), "down": shape(4 * WIDTH, WIDTH)}
        for i in range(depth)
    }
    return trace_layers(run, {**mlps, "head": {"kernel": shape(WIDTH, 16)}}, shape(rows, WIDTH))


@pytest.mark.parametrize("device", [LOCAL, ABSENT])
def test_hand_counted_layers_are_exact(device: DeviceSpec | None) -> None:
    *mlps, head = measure_costs(stack(), device)
    assert [cost.name for cost in mlps] == [f"mlp_{i}" for i in range(DEPTH)]
    for cost in mlps:
        assert cost.weight_bytes == MLP_BYTES
        assert cost.activation_bytes == ROWS * WIDTH * FLOAT
        # The hidden layer is workspace; nothing else needs to be.
        assert cost.buffer_bytes >= ROWS * 4 * WIDTH * FLOAT
        assert cost.size == cost.weight_bytes + cost.activation_bytes + cost.buffer_bytes
        assert cost.flops == 2 * 2 * ROWS * WIDTH * 4 * WIDTH + ROWS * 4 * WIDTH + ROWS * WIDTH
    assert (head.weight_bytes, head.activation_bytes) == (WIDTH * 16 * FLOAT, ROWS * 16 * FLOAT)
    assert head.flops == 2 * ROWS * WIDTH * 16


@pytest.mark.parametrize("device", [LOCAL, ABSENT])
def test_equal_layers_are_compiled_once(device: DeviceSpec | None) -> None:
    gauge = CompiledCosts(stack(), device)
    gauge.costs()
    assert gauge.num_compiles == 2
    gauge.costs()
    gauge.stage_bytes(1, 2)
    assert gauge.num_compiles == 2
    gauge.stage_bytes(0, 2)
    gauge.stage_bytes(1, 3)
    assert gauge.num_compiles == 3


@pytest.mark.parametrize("device", [LOCAL, ABSENT])
def test_a_stage_holds_no_more_than_its_layers_and_what_arrives(device: DeviceSpec | None) -> None:
    gauge = CompiledCosts(stack(), device)
    sizes = [cost.size for cost in gauge.costs()]
    for start, stop in [(0, 1), (0, DEPTH), (1, 3), (0, DEPTH + 1)]:
        held = gauge.stage_bytes(start, stop)
        weights = (
            (stop - start) * MLP_BYTES if stop <= DEPTH else DEPTH * MLP_BYTES + WIDTH * 16 * FLOAT
        )
        assert weights < held <= sum(sizes[start:stop]) + ROWS * WIDTH * FLOAT
    # Workspace is used again by one layer after the other, so that more layers leave the sum
    # further behind.
    assert gauge.stage_bytes(0, DEPTH) < sum(sizes[:DEPTH])


@pytest.mark.parametrize("device", [LOCAL, ABSENT])
def test_backward_holds_more_and_does_three_times_the_products(device: DeviceSpec | None) -> None:
    forward, both = (
        total(measure_costs(stack(2), device, backward=backward)) for backward in (False, True)
    )
    assert (both.weight_bytes, both.activation_bytes) == (
        forward.weight_bytes,
        forward.activation_bytes,
    )
    # The gradients of the weights, beside the weights.
    assert both.peak_bytes > forward.peak_bytes + MLP_BYTES
    assert both.flops == pytest.approx(3 * forward.flops, rel=0.05)


@pytest.mark.parametrize("device", [LOCAL, ABSENT])
def test_activations_grow_with_the_microbatch_and_weights_do_not(device: DeviceSpec | None) -> None:
    few, many = (total(measure_costs(stack(1, rows), device)) for rows in (32, 64))
    assert many.weight_bytes == few.weight_bytes
    assert many.activation_bytes == 2 * few.activation_bytes
    assert many.flops == 2 * few.flops


def test_integer_inputs_and_integer_outputs_are_measured_backward_too() -> None:
    def run(params: Any, tokens: jax.Array) -> Any:
        x = params["embed"][tokens]
        return x @ params["head"]["kernel"], tokens + 1

    params = {"embed": shape(32, 8), "head": {"kernel": shape(8, 4)}}
    costs = measure_costs(trace_layers(run, params, shape(2, 3, dtype=jnp.int32)), backward=True)
    assert sum(cost.weight_bytes for cost in costs) == (32 * 8 + 8 * 4) * FLOAT


@pytest.mark.parametrize("device", [ABSENT])
def test_the_seed_s_layer_is_refused_with_its_verdict(device: DeviceSpec) -> None:
    """d_model 4096 = 32 heads x 128, MLP 16384, float16: eight times an H100's cache."""

    def layer(weights: Any, x: jax.Array) -> jax.Array:
        q, k, v = ((x @ weights[name]).reshape(1, 8, 32, 128) for name in "qkv")
        x = x + jax.nn.dot_product_attention(q, k, v).reshape(8, 4096) @ weights["o"]
        return x + jax.nn.relu(x @ weights["up"]) @ weights["down"]

    def run(params: Any, x: jax.Array) -> jax.Array:
        return layer(params["layer_1"], layer(params["layer_0"], x))

    weights = {name: shape(4096, 4096, dtype=jnp.float16) for name in "qkvo"}
    weights |= {
        "up": shape(4096, 16384, dtype=jnp.float16),
        "down": shape(16384, 4096, dtype=jnp.float16),
    }
    params = {"layer_0": weights, "layer_1": weights}
    costs = measure_costs(trace_layers(run, params, shape(8, 4096, dtype=jnp.float16)), device)
    assert [cost.weight_bytes for cost in costs] == [402_653_184] * 2
    # The compiled program's arguments, its output and no more than some workspace beside them.
    assert 402_653_184 < costs[0].peak_bytes < 1.1 * 402_653_184
    with pytest.raises(CapacityError, match="402,653,184"):
        partition_layers(costs, 2, device.usable_l2_bytes)
    verdict = capacity_bound(costs, device, 16)
    assert verdict.tensor_ways == {16: 11, 8: 6, 4: 3}
    assert not verdict.is_resident


def test_without_a_compiler_for_it_a_gpu_s_sizes_come_from_shapes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measure, "can_compile_for_absent_gpus", lambda: False)
    gauge = CompiledCosts(stack(), H100)
    costs = gauge.costs()
    assert gauge.num_compiles == 0
    assert gauge.compiler.startswith("shapes only")
    # A CPU's workspace would be a number, and wrong.
    assert {cost.buffer_bytes for cost in costs} == {0}
    assert costs[0].weight_bytes == MLP_BYTES
    assert costs[0].flops == measure_costs(stack(1))[0].flops
    assert gauge.stage_bytes(0, 2) == 2 * costs[0].size


def test_the_compiler_is_named() -> None:
    assert CompiledCosts(stack(1)).compiler == "XLA for the local cpu"
    assert CompiledCosts(stack(1), CPU).compiler == "XLA for the local cpu"
    if can_compile_for_absent_gpus():
        assert (
            CompiledCosts(stack(1), H100).compiler == f"XLA:GPU for {H100.name}, which is not here"
        )


def test_sizes_by_shape_agree_with_the_compiled_ones_on_all_but_workspace() -> None:
    sizes = measured_by_shape(stack())
    for by_shape, compiled in zip(sizes.costs, measure_costs(stack()), strict=True):
        assert by_shape.name == compiled.name
        assert by_shape.weight_bytes == compiled.weight_bytes
        assert by_shape.activation_bytes == compiled.activation_bytes
        assert by_shape.buffer_bytes == 0
    assert "shapes only" in sizes.measured_on
