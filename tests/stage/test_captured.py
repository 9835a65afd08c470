"""Arrays that a function closes over: frozen weights in sizes, placement, plan and training."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

import layerwise_jax as lw
from tests.support.staging import assert_trees_close, compile_lightly

WIDTH, BATCH, LAYERS = 32, 8, 4
KEYS = jax.random.split(jax.random.key(0), LAYERS)
FROZEN = [jax.random.normal(key, (WIDTH, WIDTH)) / 6 for key in KEYS]
STACKED = jnp.stack(FROZEN)
TABLE = np.linspace(-1, 1, WIDTH * WIDTH, dtype=np.float32).reshape(WIDTH, WIDTH)
ARRAY_BYTES = WIDTH * WIDTH * 4
PARAMS = [{"a": jnp.ones((WIDTH, 2)) / 9, "b": jnp.ones((2, WIDTH)) / 9} for _ in KEYS]
X = jax.random.normal(KEYS[0], (BATCH, WIDTH))


def adapted(x: jax.Array, weight: Any, layer: dict[str, jax.Array]) -> jax.Array:
    return x + jnp.tanh(x @ weight + x @ layer["a"] @ layer["b"])


def own_arrays(params: Any, x: jax.Array) -> jax.Array:
    for weight, layer in zip(FROZEN, params, strict=True):
        x = adapted(x, weight, layer)
    return jnp.mean(x**2)


def rows_of_a_stack(params: Any, x: jax.Array) -> jax.Array:
    for index, layer in enumerate(params):
        x = adapted(x, STACKED[index], layer)
    return jnp.mean(x**2)


def one_table(params: Any, x: jax.Array) -> jax.Array:
    for layer in params:
        x = adapted(x, TABLE, layer)
    return jnp.mean(x**2)


def in_a_jitted_helper(params: Any, x: jax.Array) -> jax.Array:
    helper = jax.jit(lambda x, layer: adapted(x, TABLE, layer))
    for layer in params:
        x = helper(x, layer)
    return jnp.mean(x**2)


def partial_argument(frozen: Any, params: Any, x: jax.Array) -> jax.Array:
    for weight, layer in zip(frozen, params, strict=True):
        x = adapted(x, weight, layer)
    return jnp.mean(x**2)


FUNCTIONS = {
    "own arrays": (own_arrays, "FROZEN[0] (stage 0)"),
    "rows of a stack": (rows_of_a_stack, "STACKED (stage 0, 1)"),
    "one table": (one_table, "TABLE (stage 0, 1)"),
    "in a jitted helper": (in_a_jitted_helper, "captured 0 (stage 0, 1)"),
    "partial argument": (functools.partial(partial_argument, FROZEN), "argument 0[0] (stage 0)"),
}


def build(fn: Callable[..., Any], mesh: Mesh, **options: Any) -> lw.Pipeline:
    layers = lw.trace_layers(fn, PARAMS, X[: BATCH // 4])
    return lw.build_pipeline(layers, (0, 2, 4), mesh, 4, reduce="mean", **options)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_captured_arrays_are_counted_named_and_placed(
    name: str, stage_mesh: Callable[..., Mesh]
) -> None:
    fn, noted = FUNCTIONS[name]
    pipeline = build(fn, stage_mesh(2))
    (note,) = [note for note in pipeline.plan.notes if "captured" in note]
    assert noted in note
    held = 1 if name in ("one table", "in a jitted helper") else LAYERS // 2
    for stage in pipeline.plan.stages:
        assert stage.weight_bytes >= held * ARRAY_BYTES
    staged = pipeline.place(PARAMS)
    shard_bytes = [x.addressable_shards[0].data.nbytes for x in staged.values()]
    trained = sum(x.nbytes for x in jax.tree.leaves(PARAMS)) // 2
    assert sum(shard_bytes) == held * ARRAY_BYTES + trained
    jax.tree.map(np.testing.assert_array_equal, pipeline.gather(staged), PARAMS)


@pytest.mark.parametrize("executor", ["loop", pytest.param("host", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["own arrays", "rows of a stack"])
def test_values_gradients_and_steps(
    name: str, executor: str, stage_mesh: Callable[..., Mesh]
) -> None:
    fn, _ = FUNCTIONS[name]
    pipeline = build(fn, stage_mesh(2))
    light = compile_lightly if executor == "loop" else lambda fn: fn
    staged = pipeline.place(PARAMS, executor)
    value, gradients = light(pipeline.value_and_grad)(staged, X)
    want = jax.value_and_grad(fn)(PARAMS, X)
    assert_trees_close((value, pipeline.gather(gradients)), want, 1e-5)
    captured = {k: v for k, v in gradients.items() if "FROZEN" in k or "STACKED" in k}
    assert captured
    assert all(x.dtype == jax.dtypes.float0 for x in captured.values())
    if executor == "loop":
        gradients = light(jax.grad(pipeline))(staged, X)
        assert_trees_close(pipeline.gather(gradients), want[1], 1e-5)
        assert all(float(jnp.max(jnp.abs(gradients[name]))) == 0 for name in captured)
        before = {name: np.asarray(staged[name]) for name in captured}
        step = pipeline.train_step(optax.adamw(1e-2, weight_decay=0.5))
        staged, _, _ = step(staged, step.init(staged), X)
        jax.tree.map(np.testing.assert_array_equal, {k: staged[k] for k in captured}, before)


def test_captured_arrays_count_against_a_capacity() -> None:
    options = {"num_stages": 2, "num_microbatches": 4, "reduce": "mean"}
    with pytest.raises(lw.CapacityError, match="weights"):
        lw.layerwise(own_arrays, PARAMS, X, capacity=ARRAY_BYTES, **options)
    costs = lw.measure_costs(lw.trace_layers(own_arrays, PARAMS, X[:2]))
    assert all(cost.weight_bytes >= ARRAY_BYTES for cost in costs)


def test_layers_are_cut_where_captured_weights_are_balanced() -> None:
    """The first layer's captured array is as large as all the others together."""
    large = jax.random.normal(KEYS[1], (WIDTH, 8 * WIDTH)) / 50

    def uneven(params: Any, x: jax.Array) -> jax.Array:
        x = x + jnp.tanh(x @ large) @ large.T + x @ params[0]["a"] @ params[0]["b"]
        for weight, layer in zip(FROZEN[1:], params[1:], strict=True):
            x = adapted(x, weight, layer)
        return jnp.mean(x**2)

    plan = lw.layerwise(
        uneven, PARAMS, X, num_stages=2, num_microbatches=4, reduce="mean", capacity=None
    ).plan
    assert len(plan.stages[0].layers) == 1


def test_arrays_that_follow_the_length_of_the_batch(stage_mesh: Callable[..., Mesh]) -> None:
    """A captured array made for the batch is an input that microbatches split."""

    def numbered(params: Any, x: jax.Array) -> jax.Array:
        rows = np.tile(np.arange(x.shape[0], dtype=np.float32)[:, None], (1, 256))
        for layer in params:
            x = x + jnp.tanh(x @ layer["a"] @ layer["b"])
        return x + jnp.asarray(rows)[:, :WIDTH]

    layers = lw.trace_layers(numbered, PARAMS, X[: BATCH // 4])
    pipeline = lw.build_pipeline(layers, (0, 2, 4), stage_mesh(2), 4)
    got = compile_lightly(pipeline)(pipeline.place(PARAMS), X)
    np.testing.assert_allclose(got, numbered(PARAMS, X), rtol=1e-5, atol=1e-6)
