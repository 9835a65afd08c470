"""Real XLA:GPU programs for devices that are not there, with sizes that can be counted by hand."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec

from layerwise_jax.cost.devices import A100, CPU, DEVICES, H100, H200
from layerwise_jax.xla import aot
from layerwise_jax.xla.aot import (
    CompilerMissingError,
    absent_devices,
    absent_mesh,
    can_compile_for_absent_gpus,
    compile_for,
)
from layerwise_jax.xla.gpu_target import ARCHITECTURES, target_config

needs_plugin = pytest.mark.skipif(
    not can_compile_for_absent_gpus(), reason="the CUDA plugin (extra aot) is not importable"
)

HALF = 2  # bytes of float16
STAGES = 16


def half(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float16)


def whole(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


class Case(NamedTuple):
    """A program `fn(weights, input)` and what can be counted of it by hand: bytes, and FLOPs of its
    products.
    """

    fn: Callable[..., Any]
    weights: Any
    input: jax.ShapeDtypeStruct
    weight_bytes: int
    output_bytes: int
    product_flops: int


def mlp(weights, x):
    return jax.nn.relu(x @ weights["up"]) @ weights["down"]


def conv_net(weights, x):
    for kernel in weights:
        x = lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x)
    return x.mean((1, 2))


def attention(weights, x):
    q, k, v = ((x @ weights[name]).reshape(2, 64, 4, 32) for name in "qkv")
    return jax.nn.dot_product_attention(q, k, v).reshape(x.shape) @ weights["o"]


def mixture_of_experts(weights, x):
    chosen = jnp.argmax(x @ weights["router"], -1)
    order = jnp.argsort(chosen)
    sizes = jnp.bincount(chosen, length=4).astype(jnp.int32)
    hidden = jax.nn.relu(lax.ragged_dot(x[order], weights["up"], sizes))
    return lax.ragged_dot(hidden, weights["down"], sizes)[jnp.argsort(order)]


def scan_over_layers(weights, x):
    return lax.scan(lambda h, w: (jax.nn.relu(h @ w), None), x, weights)[0]


def tied_transformer(weights, tokens):
    x = weights["embedding"][tokens]
    for block in weights["blocks"]:
        x = x + mlp(block, x)
    return x @ weights["embedding"].T


CASES = {
    "mlp": Case(
        mlp,
        {"up": half(256, 1024), "down": half(1024, 256)},
        half(32, 256),
        weight_bytes=2 * 256 * 1024 * HALF,
        output_bytes=32 * 256 * HALF,
        product_flops=2 * 2 * 32 * 256 * 1024,
    ),
    "conv net": Case(
        conv_net,
        [half(3, 3, 16, 32), half(3, 3, 32, 32)],
        half(4, 16, 16, 16),
        weight_bytes=(3 * 3 * 16 * 32 + 3 * 3 * 32 * 32) * HALF,
        output_bytes=4 * 32 * HALF,
        product_flops=2 * (4 * 16 * 16 * 32) * (3 * 3 * 16) + 2 * (4 * 16 * 16 * 32) * (3 * 3 * 32),
    ),
    "attention": Case(
        attention,
        {name: half(128, 128) for name in "qkvo"},
        half(2, 64, 128),
        weight_bytes=4 * 128 * 128 * HALF,
        output_bytes=2 * 64 * 128 * HALF,
        product_flops=4 * 2 * (2 * 64) * 128 * 128 + 2 * 2 * (2 * 64) * 64 * 128,
    ),
    "mixture of experts": Case(
        mixture_of_experts,
        {"router": half(64, 4), "up": half(4, 64, 128), "down": half(4, 128, 64)},
        half(32, 64),
        weight_bytes=(64 * 4 + 2 * 4 * 64 * 128) * HALF,
        output_bytes=32 * 64 * HALF,
        product_flops=2 * 32 * 64 * 4 + 2 * 2 * 32 * 64 * 128,
    ),
    "scan": Case(
        scan_over_layers,
        half(6, 256, 256),
        half(32, 256),
        weight_bytes=6 * 256 * 256 * HALF,
        output_bytes=32 * 256 * HALF,
        product_flops=6 * 2 * 32 * 256 * 256,
    ),
    "tied transformer": Case(
        tied_transformer,
        {"embedding": half(512, 64), "blocks": [{"up": half(64, 256), "down": half(256, 64)}] * 2},
        whole(2, 16),
        weight_bytes=(512 * 64 + 2 * 2 * 64 * 256) * HALF,
        output_bytes=2 * 16 * 512 * HALF,
        product_flops=2 * 2 * 2 * (2 * 16) * 64 * 256 + 2 * (2 * 16) * 64 * 512,
    ),
}


@needs_plugin
@pytest.mark.parametrize("name", CASES)
def test_hand_countable_sizes_are_exact(name):
    case = CASES[name]
    compiled = compile_for(H100, case.fn, [case.weights, case.input], weights=[0])
    assert compiled.compiled_by == "XLA:GPU for NVIDIA H100 80GB HBM3, absent"
    assert (
        compiled.weight_bytes
        == case.weight_bytes
        == bytes_of_parameters(compiled, jax.tree.leaves(case.weights))
    )
    assert (
        compiled.argument_bytes == case.weight_bytes + case.input.size * case.input.dtype.itemsize
    )
    assert compiled.output_bytes == case.output_bytes
    # Operations that are not products are few and small here.
    assert case.product_flops <= compiled.flops < 1.3 * case.product_flops
    held = compiled.argument_bytes + compiled.output_bytes
    assert held <= compiled.peak_bytes <= held + compiled.constant_bytes + compiled.temp_bytes
    assert compiled.bytes_accessed >= compiled.output_bytes


def bytes_of_parameters(compiled: aot.CompiledProgram, leaves: list[Any]) -> int:
    """Bytes that the compiled program allocates for its first parameters."""
    return sum(
        each.size
        for each in compiled.assignment.allocations
        if each.parameter in range(len(leaves))
    )


@needs_plugin
def test_the_seed_layer_has_402_653_184_weight_bytes_in_the_compiled_program():
    def layer(weights, x):
        q, k, v = ((x @ weights[name]).reshape(1, 8, 32, 128) for name in "qkv")
        x = x + jax.nn.dot_product_attention(q, k, v).reshape(8, 4096) @ weights["o"]
        return x + jax.nn.relu(x @ weights["up"]) @ weights["down"]

    weights = {name: half(4096, 4096) for name in "qkvo"} | {
        "up": half(4096, 16384),
        "down": half(16384, 4096),
    }
    # Library products compile in a tenth of the time; arguments are the same.
    options = {"xla_gpu_enable_triton_gemm": False}
    compiled = compile_for(H100, layer, [weights, half(8, 4096)], weights=[0], options=options)
    assert compiled.weight_bytes == 402_653_184 == bytes_of_parameters(compiled, list(weights))
    assert H100.tensor_ways_to_fit(compiled.weight_bytes) == 11
    assert compiled.peak_bytes > compiled.weight_bytes > H100.l2_bytes


@needs_plugin
def test_a_pipeline_over_sixteen_absent_devices():
    mesh = absent_mesh(H100, {"stage": STAGES})
    to_next = [(i, i + 1) for i in range(STAGES - 1)]

    def run(weights, x):
        def tick(h, _):
            return lax.ppermute(jax.nn.relu(h @ weights[0]), "stage", to_next), None

        return lax.scan(tick, x, None, length=20)[0]

    split = PartitionSpec("stage")
    pipeline = jax.shard_map(run, mesh=mesh, in_specs=(split, split), out_specs=split)
    weights, x = (
        jax.ShapeDtypeStruct(shape, jnp.float16, sharding=NamedSharding(mesh, split))
        for shape in [(STAGES, 128, 128), (STAGES * 8, 128)]
    )
    compiled = compile_for(H100, pipeline, [weights, x], weights=[0])
    assert compiled.weight_bytes == 128 * 128 * HALF
    assert compiled.argument_bytes == (128 * 128 + 8 * 128) * HALF
    assert compiled.output_bytes == 8 * 128 * HALF
    assert compiled.flops == 20 * (2 * 8 * 128 * 128 + 8 * 128)
    names = [
        buffer.instruction for each in compiled.assignment.allocations for buffer in each.buffers
    ]
    assert any(re.match(r"collective-permute", name) for name in names)


@needs_plugin
def test_a_backward_pass_holds_its_gradients():
    def gradients(weights, x):
        return jax.grad(lambda w: mlp(w, x).astype(jnp.float32).sum())(weights)

    case = CASES["mlp"]
    compiled = compile_for(H100, gradients, [case.weights, case.input], weights=[0])
    # The product of the output is dead: what is left is one product forward and three backward.
    assert case.weight_bytes <= compiled.output_bytes < case.weight_bytes + 64
    assert compiled.flops // (2 * 32 * 256 * 1024) == 4


@needs_plugin
def test_donated_arguments_hold_the_outputs():
    compiled = compile_for(
        H100, lambda w, x: w + x, [half(512, 512), half(512, 512)], weights=[0], donate=[0]
    )
    assert compiled.alias_bytes == compiled.weight_bytes == 512 * 512 * HALF
    assert compiled.output_bytes == 0
    assert compiled.peak_bytes == 2 * 512 * 512 * HALF


@needs_plugin
def test_options_reach_the_compiler_and_library_calls_are_named():
    case = CASES["mlp"]
    library = compile_for(
        H100, case.fn, [case.weights, case.input], options={"xla_gpu_enable_triton_gemm": False}
    )
    assert library.library_calls == ("__cublas$lt$matmul",)
    assert compile_for(H100, case.fn, [case.weights, case.input]).library_calls == ()
    with pytest.raises(RuntimeError, match="No such compile option: 'xla_gpu_no_such'"):
        compile_for(H100, case.fn, [case.weights, case.input], options={"xla_gpu_no_such": True})


@needs_plugin
def test_weights_below_a_byte_are_packed_and_keys_hold_their_data():
    weights = jax.ShapeDtypeStruct((64, 64), jnp.int4)
    assert (
        compile_for(H100, lambda w: w.astype(jnp.int8), [weights], weights=[0]).weight_bytes
        == 64 * 64 // 2
    )
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    assert (
        compile_for(H100, lambda k: jax.random.bits(k, (8,)), [key], weights=[0]).weight_bytes == 8
    )


@needs_plugin
@pytest.mark.parametrize("device", DEVICES[:-1], ids=lambda device: device.name)
def test_every_gpu_of_the_table_can_be_compiled_for(device):
    compiled = compile_for(device, lambda x: x + 1, [half(1024)])
    assert device.name in compiled.compiled_by
    assert compiled.peak_bytes == 2 * 1024 * HALF


@needs_plugin
@pytest.mark.parametrize("count", [1, 8, 12, 1024])
def test_any_number_of_devices_can_be_absent(count):
    devices = absent_devices(A100, count)
    assert len(devices) == count
    assert {device.device_kind for device in devices} == {A100.name}


def test_the_local_backend_is_measured_likewise():
    case = CASES["mlp"]
    compiled = compile_for(None, case.fn, [case.weights, case.input], weights=[0])
    assert compiled.compiled_by == "XLA:CPU for cpu"
    assert compiled.weight_bytes == case.weight_bytes
    assert compiled.argument_bytes == case.weight_bytes + 32 * 256 * HALF
    assert bytes_of_parameters(compiled, list(case.weights)) == case.weight_bytes
    # XLA's own peak leaves out temporaries on a CPU.
    assert compiled.peak_bytes > compiled.argument_bytes + compiled.output_bytes


def test_a_program_from_the_persistent_cache_is_sized_alike(tmp_path):
    settings = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}

    def sizes() -> dict[str, Any]:
        compiled = dataclasses.asdict(compile_for(None, lambda x: jnp.tanh(x) @ x, [half(64, 64)]))
        return {name: value for name, value in compiled.items() if name.endswith("_bytes")}

    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        first = sizes()
        assert list(tmp_path.iterdir()), "nothing was cached, so this test shows nothing"
        assert sizes() == first
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def test_a_missing_plugin_is_said_in_words(monkeypatch):
    monkeypatch.setattr(aot, "PLUGINS", ("no_such_plugins.xla_cuda13",))
    assert not can_compile_for_absent_gpus()
    with pytest.raises(CompilerMissingError, match=r"pip install 'layerwise-jax\[aot\]'"):
        compile_for(H200, mlp, [CASES["mlp"].weights, CASES["mlp"].input])


def test_a_cpu_is_no_target():
    with pytest.raises(ValueError, match="got cpu of None"):
        compile_for(CPU, mlp, [CASES["mlp"].weights, CASES["mlp"].input])


def test_positions_that_are_not_there_are_named():
    with pytest.raises(ValueError, match=r"positions of the 2 arguments, got \[2, -1\]"):
        compile_for(
            None, mlp, [CASES["mlp"].weights, CASES["mlp"].input], weights=[0, 2], donate=[-1]
        )


def test_the_target_says_what_the_spec_says():
    text = target_config(H200.updated(l2_bytes=60 * 2**20, multiprocessors=77))
    assert "l2_cache_size: 62914560" in text
    assert "core_count: 77" in text
    assert "major: 9 minor: 0" in text
    assert {spec.compute_capability for spec in DEVICES} - {None} == set(ARCHITECTURES)
