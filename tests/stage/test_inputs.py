"""Inputs and parameters that are no plain float arrays: None, complex numbers, integers that stand
for weights.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layerwise_jax as lw

WIDTH = 8
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, WIDTH)), jnp.float32)


def draw(seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(WIDTH, WIDTH)) / 3, jnp.float32)


def assert_staged_like_unstaged(fn: Any, params: Any, *inputs: Any, **options: Any) -> None:
    pipeline = lw.layerwise(
        fn, params, *inputs, num_stages=2, num_microbatches=2, capacity=None, **options
    )
    got = pipeline(pipeline.place(params), *inputs)
    np.testing.assert_allclose(got, fn(params, *inputs), rtol=1e-5, atol=1e-6)


def masked(params: list[jax.Array], x: jax.Array, mask: jax.Array | None) -> jax.Array:
    for weight in params:
        x = jnp.tanh(x @ weight if mask is None else mask * (x @ weight))
    return x


@pytest.mark.parametrize("in_axes", [0, (0, None), (0, 0)])
def test_an_optional_input_may_be_none(in_axes: Any) -> None:
    assert_staged_like_unstaged(masked, [draw(i) for i in range(4)], X, None, in_axes=in_axes)


def test_complex_parameters() -> None:
    def fn(params: list[jax.Array], x: jax.Array) -> jax.Array:
        for weight in params:
            x = jnp.tanh(x @ weight)
        return x

    assert_staged_like_unstaged(fn, [draw(i) + 1j * draw(i + 4) for i in range(4)], X)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int32])
def test_quantised_parameters(dtype: Any) -> None:
    def fn(params: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
        for block in params:
            x = jnp.tanh(x @ (block["weight"].astype(jnp.float32) * block["scale"]))
        return x

    numbers = jnp.arange(WIDTH * WIDTH, dtype=dtype).reshape(WIDTH, WIDTH)
    assert_staged_like_unstaged(fn, [{"weight": numbers, "scale": jnp.float32(0.01)}] * 4, X)
