"""The common body is a function of weights and reads: a hand-written one can stand in its place."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layerwise_jax.build import build_pipeline
from layerwise_jax.trace.layers import trace_layers
from tests.support.staging import assert_trees_close

WIDTH = 8


def loss(params: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    for i, layer in enumerate(params):
        x = jnp.tanh(x @ layer["weight"] + layer["bias"]) * (0.5 + i)
    return jnp.mean(x**2)


def test_a_kernel_stands_for_the_body(stage_mesh: Callable) -> None:
    """Three equal stages but for a literal: weights and reads come in the order of the canonical
    form, the literal of the stage last.
    """
    draw = np.random.default_rng(0).standard_normal
    params = [
        {
            "weight": jnp.asarray(draw((WIDTH, WIDTH)) / 3, jnp.float32),
            "bias": jnp.asarray(draw(WIDTH), jnp.float32),
        }
        for _ in range(3)
    ]
    x = jnp.asarray(draw((12, WIDTH)), jnp.float32)
    pipeline = build_pipeline(
        trace_layers(loss, params, x[:3]), [0, 1, 2, 3], stage_mesh(3), 4, reduce="mean"
    )
    alignment = pipeline.loop.alignment
    assert alignment.num_layers == 1
    shapes: list[list[tuple[int, ...]]] = []

    def kernel(
        weights: Sequence[Any], reads: Sequence[Any], results: Sequence[int], rows: Any
    ) -> list[Any]:
        del rows
        (matrix,) = [x for x in weights if x.ndim == 2]
        (bias,) = [x for x in weights if x.ndim == 1]
        activation, *_, factor = reads
        shapes.append([x.shape for x in reads])
        assert len(results) == 1
        return [jnp.tanh(activation @ matrix + bias) * factor]

    loop = replace(pipeline.loop, alignment=replace(alignment, body=kernel))
    staged = pipeline.place(params)
    want = jax.value_and_grad(loss)(params, x)
    value, gradients = jax.jit(replace(pipeline, loop=loop).value_and_grad)(staged, x)
    assert_trees_close((value, pipeline.gather(gradients)), want, 2e-6)
    assert shapes, "the kernel was called"
    assert all(shape == [(3, WIDTH), ()] for shape in shapes)
