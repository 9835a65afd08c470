"""Outputs as people write them: masked means, counts, extremes and literals beside the loss."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import layerwise_jax as lw

WIDTH, BATCH = 4, 8
PARAMS = [jax.random.normal(jax.random.key(i), (WIDTH, WIDTH)) / 2 for i in range(4)]
BATCHED = {
    "x": jax.random.normal(jax.random.key(9), (BATCH, WIDTH)),
    "mask": jnp.array([1, 1, 1, 0, 0, 0, 0, 1.0]),
    "labels": jnp.arange(BATCH) % WIDTH,
}

OPTIONS = {
    "1f1b": {},
    "gpipe, residuals": {"schedule": "gpipe", "remat": None},
    "interleaved": {"schedule": "interleaved_1f1b"},
    "host": {"executor": "host"},
}


def net(params: Any, x: jax.Array) -> jax.Array:
    for w in params:
        x = x + jnp.tanh(x @ w)
    return x


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.sum(values * mask) / jnp.maximum(jnp.sum(mask), 1)


def loss(params: Any, batch: Any) -> Any:
    """Label smoothing and z-loss over the examples that count; metrics, a rate and a flag."""
    logits = net(params, batch["x"])
    labels = 0.9 * jax.nn.one_hot(batch["labels"], WIDTH) + 0.1 / WIDTH
    log_z = jax.nn.logsumexp(logits, -1)
    entropy = log_z - jnp.sum(logits * labels, -1)
    hits = (jnp.argmax(logits, -1) == batch["labels"]) & (batch["mask"] > 0)
    metrics = {
        "hits": jnp.sum(hits),
        "tokens": jnp.sum(batch["mask"]),
        "largest": jnp.max(logits),
        "smallest": jnp.min(logits, 0),
        "mean": jnp.mean(log_z, where=batch["mask"] > 0),
        "rate": 3e-4,
        "final": True,
    }
    return masked_mean(entropy + 1e-4 * log_z**2, batch["mask"]), metrics


def check(pipeline: lw.Pipeline) -> None:
    staged = pipeline.place(PARAMS)
    run = pipeline.value_and_grad
    value, grads = (run if pipeline.options.executor == "host" else jax.jit(run))(staged, BATCHED)
    expected, gradients = jax.value_and_grad(loss, has_aux=True)(PARAMS, BATCHED)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), value, expected
    )
    for mine, theirs in zip(pipeline.gather(grads), gradients, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)


def build(mesh: Mesh, **options: Any) -> lw.Pipeline:
    return lw.layerwise(
        loss, PARAMS, BATCHED, mesh=mesh, num_microbatches=2, capacity=None, **options
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_outputs_equal_the_unstaged_ones(name: str, stage_mesh: Callable[..., Mesh]) -> None:
    mesh = stage_mesh(2)
    layers = lw.trace_layers(loss, PARAMS, jax.tree.map(lambda x: x[: BATCH // 2], BATCHED))
    boundaries = (0, 1, 2, 3, 4) if name == "interleaved" else (0, 2, 4)
    check(lw.build_pipeline(layers, boundaries, mesh, 2, **OPTIONS[name]))


def test_replicas_share_the_denominator() -> None:
    mesh = jax.make_mesh((2, 2), ("data", "stage"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    check(build(mesh))


def test_words_assert_what_is_inferred(stage_mesh: Callable[..., Mesh]) -> None:
    words = {
        "hits": "count",
        "tokens": "sum",
        "largest": "max",
        "smallest": "min",
        "mean": "mean",
        "rate": "auto",
        "final": None,
    }
    check(build(stage_mesh(2), reduce=("mean", words)))
    with pytest.raises(lw.BatchError, match=r"\[1\]\['hits'\] is a sum over .* says 'mean'"):
        build(stage_mesh(2), reduce=("mean", words | {"hits": "mean"}))
    with pytest.raises(ValueError, match="prefix of the outputs' tree"):
        build(stage_mesh(2), reduce={"loss": "mean"})


def test_a_maximum_is_no_loss(stage_mesh: Callable[..., Mesh]) -> None:
    def largest(params: Any, batch: Any) -> jax.Array:
        return jnp.max(net(params, batch["x"]))

    pipeline = lw.layerwise(
        largest, PARAMS, BATCHED, mesh=stage_mesh(2), num_microbatches=2, capacity=None
    )
    staged = pipeline.place(PARAMS)
    np.testing.assert_allclose(pipeline(staged, BATCHED), largest(PARAMS, BATCHED), rtol=1e-6)
    with pytest.raises(ValueError, match="must be a sum or mean over the examples"):
        pipeline.value_and_grad(staged, BATCHED)
