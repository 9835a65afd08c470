"""A small model to save and restore, and what the tests of checkpoints take for the same."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layerwise_jax.build import build_pipeline
from layerwise_jax.pipeline import Pipeline
from layerwise_jax.trace.layers import trace_layers
from tests.support.staging import even_boundaries

WIDTH, ROWS = 8, 16


def assert_same(got: Any, want: Any) -> None:
    """Two trees have the same structure, and leaves of the same type and the same bits."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (jnp.shape(x), x.dtype) == (jnp.shape(y), y.dtype)
        if jnp.issubdtype(y.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def draw(depth: int = 8, dtype: Any = jnp.float32) -> list[jax.Array]:
    random = np.random.default_rng(0)
    return [jnp.asarray(random.normal(size=(WIDTH, WIDTH)) / 3, dtype) for _ in range(depth)]


def loss(params: list[jax.Array], x: jax.Array) -> jax.Array:
    for weight in params:
        x = jnp.tanh(x @ weight)
    return jnp.mean(jnp.square(x - 1.0))


X = jnp.asarray(np.random.default_rng(1).normal(size=(ROWS, WIDTH)), jnp.float32)


def stage(
    mesh: Any, num_microbatches: int = 4, dtype: Any = jnp.float32, **options: Any
) -> Pipeline:
    """The pipeline of `loss` over the mesh."""
    rows = X[: ROWS // num_microbatches].astype(dtype)
    layers = trace_layers(loss, draw(dtype=dtype), rows)
    boundaries = even_boundaries(len(layers), mesh.shape["stage"])
    return build_pipeline(layers, boundaries, mesh, num_microbatches, reduce="mean", **options)
