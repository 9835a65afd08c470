"""Residual policy "cheap" in the loop: products are kept, the rest is computed again."""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layerwise_jax.build import build_pipeline
from layerwise_jax.trace.layers import trace_layers
from tests.models.zoo import CASES
from tests.run.test_training_loop import tick_bodies
from tests.support.staging import (
    assert_trees_close,
    compile_lightly,
    stage_case,
    uneven_boundaries,
)

WIDTH = 6


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("checkpointed", "1f1b"),
        pytest.param("unet", "gpipe", marks=pytest.mark.slow),
        pytest.param("gpt_dropout", "zero_bubble", marks=pytest.mark.slow),
        pytest.param("mixture_of_experts", "1f1b", marks=pytest.mark.slow),
        ("custom_derivatives", "zero_bubble"),
    ],
)
def test_gradients_are_the_unstaged_ones(name: str, schedule: str, stage_mesh: Callable) -> None:
    """The function's own checkpoints and custom rules inside of it; bubbles filled with NaN."""
    case = CASES[name]()
    pipeline = stage_case(
        case,
        case.loss_fn,
        stage_mesh(3),
        4,
        uneven_boundaries,
        remat="cheap",
        schedule=schedule,
        bubble_fill=math.nan,
    )
    value, grads = compile_lightly(pipeline.value_and_grad)(
        pipeline.place(case.params), *case.inputs
    )
    want = compile_lightly(jax.value_and_grad(case.loss_fn))(case.params, *case.inputs)
    assert_trees_close((value, pipeline.gather(grads)), want, max(case.tolerance, 2e-6))


def loss(params: list[jax.Array], x: jax.Array) -> jax.Array:
    for weight in params:
        x = jnp.sin(jax.nn.gelu(x @ weight))
    return jnp.mean(x**2)


PARAMS = [
    jnp.asarray(np.random.default_rng(i).standard_normal((WIDTH, WIDTH)), jnp.float32)
    for i in range(6)
]
X = jnp.ones((12, WIDTH))


def counts(remat: Literal["stage", "cheap"] | None, mesh: Any) -> dict[str, int]:
    """Instructions of the compiled training program, by name, and bytes that its ticks carry."""
    layers = trace_layers(loss, PARAMS, X[:3])
    pipeline = build_pipeline(
        layers, (0, 2, 4, len(layers)), mesh, 4, reduce="mean", remat=remat, skip_bubbles=False
    )
    body, *_ = tick_bodies(pipeline, PARAMS, X)
    carried = sum(x.aval.size * x.aval.dtype.itemsize for x in body.outvars)
    # The jaxpr has dead code: compile.
    program = jax.jit(pipeline.value_and_grad).lower(pipeline.place(PARAMS), X).compile().as_text()
    return {"bytes": carried, **{name: program.count(f" {name}(") for name in ("dot", "tanh")}}


def test_products_are_kept_and_the_rest_is_computed_again(stage_mesh: Callable) -> None:
    mesh = stage_mesh(3)
    everything, cheap, nothing = (counts(remat, mesh) for remat in (None, "cheap", "stage"))
    assert cheap["dot"] == everything["dot"] < nothing["dot"]
    assert cheap["tanh"] > everything["tanh"]
    assert cheap["bytes"] < everything["bytes"]
