"""Weight gradients of narrow weights: products in float32, straight into the accumulators."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layerwise_jax.build import build_pipeline
from layerwise_jax.run import vjp
from layerwise_jax.run.linearize import gradients_of
from layerwise_jax.trace.layers import trace_layers
from tests.run.test_training_loop import equations, tick_bodies

HALF = jnp.bfloat16
WIDTH, ROWS, PARTS = 8, 16, 4


def draw(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), HALF)


def loss(params: list[jax.Array], x: jax.Array) -> jax.Array:
    for weight in params:
        x = jnp.tanh(x @ weight)
    return jnp.mean(x.astype(jnp.float32) ** 2)


PARAMS = [draw(i, WIDTH, WIDTH) for i in range(4)]
X = draw(9, ROWS * PARTS, WIDTH)


def stage(mesh: Any, **options: Any) -> Any:
    layers = trace_layers(loss, PARAMS, X[:ROWS])
    return build_pipeline(layers, (0, 1, 2, 3, len(layers)), mesh, PARTS, reduce="mean", **options)


def wide_products(pipeline: Any) -> int:
    """Products of two narrow operands that return float32."""
    return sum(
        eqn.primitive.name == "dot_general"
        and eqn.outvars[0].aval.dtype == jnp.float32
        and {x.aval.dtype for x in eqn.invars} == {jnp.dtype(HALF)}
        for body in tick_bodies(pipeline, PARAMS, X)
        for eqn in equations(body)
    )


@pytest.mark.parametrize("remat", ["stage", "cheap", None])
def test_gradients_are_closer_to_exact_ones(
    remat: Any, stage_mesh: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Than products that are rounded: against the gradients in float32."""
    pipeline = stage(stage_mesh(4), remat=remat)
    staged = pipeline.place(PARAMS)
    assert wide_products(pipeline) >= 1
    _, wide = jax.jit(pipeline.value_and_grad)(staged, X)
    monkeypatch.setattr(vjp, "gradients_of", lambda vjp_fn, cotangents, _: vjp_fn(cotangents)[0])
    other = stage(stage_mesh(4), remat=remat)
    assert wide_products(other) == 0
    _, narrow = jax.jit(other.value_and_grad)(staged, X)
    exact = jax.grad(loss)([w.astype(jnp.float32) for w in PARAMS], X.astype(jnp.float32))

    def error(gradients: Any) -> float:
        differences = jax.tree.map(
            lambda g, e: jnp.sum((g.astype(jnp.float32) - e) ** 2),
            pipeline.gather(gradients),
            exact,
        )
        return float(sum(jax.tree.leaves(differences)))

    assert error(wide) <= 1.02 * error(narrow)


def test_a_weight_with_two_uses_keeps_its_sum() -> None:
    """Both products are added in bfloat16 by the vjp, so that neither may be widened by itself."""
    weight, x = PARAMS[0], X[:ROWS]
    _, vjp_fn = jax.vjp(
        lambda kept: x @ kept["a"] @ kept["a"] @ kept["b"], {"a": weight, "b": weight}
    )
    cotangent = jnp.ones((ROWS, WIDTH), HALF)
    gradients = gradients_of(vjp_fn, cotangent, {"a": weight, "b": weight})
    assert (gradients["a"].dtype, gradients["b"].dtype) == (HALF, jnp.float32)
    (want,) = vjp_fn(cotangent)
    np.testing.assert_array_equal(gradients["a"], want["a"])
    np.testing.assert_array_equal(gradients["b"].astype(HALF), want["b"])


def test_products_inside_of_calls_are_found() -> None:
    """A jit, and a checkpoint, whether or not its recomputation may be merged with the forward."""
    weight, x = PARAMS[0], X[:ROWS]
    cotangent = jnp.ones((ROWS, WIDTH), HALF)

    def dtype_of(run: Callable) -> Any:
        _, vjp_fn = jax.vjp(lambda kept: run(kept["a"]), {"a": weight})
        return gradients_of(vjp_fn, cotangent, {"a": weight})["a"].dtype

    def run(weight: jax.Array) -> jax.Array:
        return jnp.sin(x @ weight)

    assert dtype_of(jax.jit(run)) == jnp.float32
    assert dtype_of(jax.checkpoint(run, prevent_cse=False)) == jnp.float32
    assert dtype_of(jax.checkpoint(run)) == jnp.float32
