"""The compiled loop: operations per tick, read from XLA's optimized HLO."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from layerwise_jax.build import build_pipeline
from layerwise_jax.cost.devices import H100
from layerwise_jax.trace.layers import trace_layers
from layerwise_jax.xla.aot import absent_mesh, can_compile_for_absent_gpus
from tests.support.hlo_text import Instruction, loop_bodies, read_module

NUM_STAGES, NUM_MICROBATCHES, ROWS = 4, 8, 3
# Primes, so that no activation, which has a multiple of ROWS elements, has as many as a weight.
WIDTH, VOCABULARY = 17, 23
WEIGHT_SIZES = {WIDTH * WIDTH, WIDTH, VOCABULARY * WIDTH}
VIEWS = {"parameter", "get-tuple-element", "bitcast", "tuple"}

Params = dict[str, Any]


def draw(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


def block(layer: Params, x: jax.Array) -> jax.Array:
    return x + jnp.tanh(x @ layer["weight"] + layer["bias"])


def stack(params: Params, x: jax.Array) -> jax.Array:
    for layer in params["blocks"]:
        x = block(layer, x)
    return x


def language_model(params: Params, tokens: jax.Array) -> jax.Array:
    return stack(params, params["embed"][tokens]) @ params["head"]


def unlike_layers(params: Params, x: jax.Array) -> jax.Array:
    for layer, function in zip(
        params["blocks"], [jnp.sin, jnp.cos, jnp.tanh, jnp.exp] * 2, strict=True
    ):
        x = function(x @ layer["weight"] + layer["bias"])
    return x


def blocks() -> Params:
    return {"blocks": [{"weight": draw(WIDTH, WIDTH), "bias": draw(WIDTH)} for _ in range(8)]}


def words() -> Params:
    return {**blocks(), "embed": draw(VOCABULARY, WIDTH), "head": draw(WIDTH, VOCABULARY)}


def compiled_loop(compiled: Any) -> list[Instruction]:
    (body,) = loop_bodies(read_module(compiled.as_text()))
    return body


def pipeline_loop(
    fn: Callable, params: Params, x: jax.Array, boundaries: Sequence[int], mesh: Mesh
) -> Any:
    """The loop of a pipeline that is compiled for the mesh from shapes alone, whether its devices
    are there or not.
    """
    params = jax.eval_shape(lambda: params)
    layers = trace_layers(fn, params, x[:ROWS])
    pipeline = build_pipeline(layers, boundaries, mesh, NUM_MICROBATCHES)
    inputs = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec()))
    return compiled_loop(jax.jit(pipeline).lower(pipeline.place(params), inputs).compile())


def opcodes(body: Sequence[Instruction]) -> Counter[str]:
    """Counts of each opcode; an asynchronous pair counts once, under the synchronous name."""
    return Counter(instruction.opcode.removesuffix("-start") for instruction in body)


def weights_made(body: Sequence[Instruction]) -> list[Instruction]:
    """Instructions that make an array as large as a weight, so that its bytes are written in every
    tick.
    """
    return [i for i in body if i.num_elements in WEIGHT_SIZES and i.opcode not in VIEWS]


CASES = {
    "equal": (stack, blocks, [0, 2, 4, 6, 8]),
    "embedding and head": (language_model, words, [0, 3, 5, 7, 10]),
    "unequal counts": (stack, blocks, [0, 1, 3, 5, 8]),
    "unlike layers": (unlike_layers, blocks, [0, 1, 4, 6, 8]),
}


@pytest.fixture(params=["cpu", "h100"])
def mesh(request: pytest.FixtureRequest, stage_mesh: Callable[..., Mesh]) -> Mesh:
    """Emulated devices, and GPUs that are not there."""
    if request.param == "cpu":
        return stage_mesh(NUM_STAGES)
    if not can_compile_for_absent_gpus():
        pytest.skip("XLA's compiler for GPUs is not installed")
    return absent_mesh(H100, {"stage": NUM_STAGES})


@pytest.mark.parametrize("case", CASES)
def test_a_tick_branches_only_between_unequal_stages_and_copies_no_weight(
    mesh: Mesh, case: str
) -> None:
    fn, params, boundaries = CASES[case]
    rows = NUM_MICROBATCHES * ROWS
    x = (
        jnp.arange(rows, dtype=jnp.int32) % VOCABULARY
        if fn is language_model
        else draw(rows, WIDTH)
    )
    body = pipeline_loop(fn, params(), x, boundaries, mesh)
    assert opcodes(body)["conditional"] == (0 if case == "equal" else 1)
    assert opcodes(body)["collective-permute"] == 1
    assert any(instruction.num_elements == WIDTH * WIDTH for instruction in body)
    assert not weights_made(body)


def test_packed_weights_would_be_seen(mesh: Mesh) -> None:
    """The control: a loop over stages whose weights are one flat row does copy every weight in
    every tick.
    """
    size = WIDTH * WIDTH + WIDTH

    def on_device(packed: jax.Array, x: jax.Array) -> jax.Array:
        def tick(x: jax.Array, _: Any) -> tuple[jax.Array, None]:
            for layer in range(2):
                row = lax.dynamic_slice_in_dim(packed[0], layer * size, size)
                weight = row[: WIDTH * WIDTH].reshape(WIDTH, WIDTH)
                x = block({"weight": weight, "bias": row[WIDTH * WIDTH :]}, x)
            return lax.ppermute(x, "stage", [(s, s + 1) for s in range(NUM_STAGES - 1)]), None

        return lax.scan(tick, x, None, NUM_MICROBATCHES)[0]

    specs = PartitionSpec("stage"), PartitionSpec()
    mapped = jax.shard_map(
        on_device, mesh=mesh, in_specs=specs, out_specs=specs[1], check_vma=False
    )
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip([(NUM_STAGES, 2 * size), (ROWS, WIDTH)], specs, strict=True)
    ]
    assert weights_made(compiled_loop(jax.jit(mapped).lower(*shapes).compile()))


def test_a_branch_would_be_seen() -> None:
    """The control for branches, and for loops within loops."""

    def tick(x: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        return lax.switch(
            i,
            [jnp.sin, jnp.cos, lambda x: lax.fori_loop(0, x.astype(int), lambda _, y: y * 2, x)],
            x,
        ), None

    body = compiled_loop(
        jax.jit(lambda x: lax.scan(tick, x, jnp.arange(3))[0]).lower(1.0).compile()
    )
    assert opcodes(body)["conditional"] == 1
    assert opcodes(body)["sine"] == opcodes(body)["cosine"] == opcodes(body)["while"] == 1
