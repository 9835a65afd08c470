"""Twenty training steps, staged and unstaged: frozen weights, averaged weights, mixed precision,
batch statistics.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from layerwise_jax.build import build_pipeline
from layerwise_jax.trace.layers import trace_layers
from tests.models.zoo import CASES
from tests.support.staging import (
    STEPS_TOLERANCE,
    assert_trees_close,
    compile_lightly,
    run_unstaged,
    stage_step,
    widened,
)
from tests.support.summation import largest_difference

pytestmark = pytest.mark.usefixtures("float64")

STEPS, WIDTH = 20, 16
TX = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2, eps=1e-5))

Params = list[dict[str, jax.Array]]


def low_rank_layers(depth: int = 4, dtype: Any = jnp.float64) -> Params:
    """Layers of a whole weight and a low-rank one beside it, as LoRA has them."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), dtype)

    return [
        {"whole": draw(WIDTH, WIDTH), "down": draw(WIDTH, 2), "up": draw(2, WIDTH)}
        for _ in range(depth)
    ]


def loss_of(params: Params, x: jax.Array, dtype: Any = jnp.float64) -> jax.Array:
    target = jnp.sin(3 * x)
    x = x.astype(dtype)
    for layer in params:
        whole, down, up = (layer[name].astype(dtype) for name in ("whole", "down", "up"))
        x = jnp.tanh(x @ whole + (x @ down) @ up)
    return jnp.mean((x.astype(target.dtype) - target) ** 2)


def batch(dtype: Any = jnp.float64) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=(16, WIDTH)), dtype)


def unstaged_steps(
    value_and_grad: Callable[..., Any], params: Any, x: jax.Array | None = None
) -> tuple[list[Any], list[float]]:
    """(parameters after every step, losses) of optax as everyone uses it."""
    x = batch() if x is None else x
    state, kept, losses = TX.init(params), [], []

    @compile_lightly
    def step(params: Any, state: Any) -> tuple[Any, Any, Any]:
        loss, grads = value_and_grad(params, x)
        updates, state = TX.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    for _ in range(STEPS):
        params, state, loss = step(params, state)
        kept.append(params)
        losses.append(float(loss))
    return kept, losses


def staged_steps(
    pipeline: Any, params: Any, x: jax.Array | None = None
) -> tuple[list[Any], list[float]]:
    x = batch() if x is None else x
    step, staged = pipeline.train_step(TX), pipeline.place(params)
    state, kept, losses = step.init(staged), [], []
    for _ in range(STEPS):
        staged, state, loss = step(staged, state, x)
        kept.append(jax.device_get(pipeline.gather(staged)))
        losses.append(float(loss))
    return kept, losses


def pipeline_of(loss: Callable[..., Any], params: Params, mesh: Any, **options: Any) -> Any:
    layers = trace_layers(loss, params, batch(params[0]["whole"].dtype)[:4])
    return build_pipeline(layers, (0, 2, 4), mesh, 4, reduce="mean", **options)


def test_low_rank_weights_are_trained_beside_frozen_ones(stage_mesh: Callable) -> None:
    """The optimiser, its norm included, sees what is trained; what is frozen comes through bit for
    bit.
    """
    params = low_rank_layers()
    trained = [{"whole": False, "down": True, "up": True} for _ in params]

    def value_and_grad(low_rank: Any, x: jax.Array) -> Any:
        whole = [
            {**layer, "whole": held["whole"]} for layer, held in zip(low_rank, params, strict=True)
        ]
        loss, grads = jax.value_and_grad(loss_of)(whole, x)
        return loss, [{name: grad[name] for name in ("down", "up")} for grad in grads]

    low_rank = [{name: layer[name] for name in ("down", "up")} for layer in params]
    want, losses = unstaged_steps(value_and_grad, low_rank)
    pipeline = pipeline_of(loss_of, params, stage_mesh(2), trainable=trained)
    got, staged_losses = staged_steps(pipeline, params)
    np.testing.assert_allclose(staged_losses, losses, rtol=STEPS_TOLERANCE)
    assert_trees_close(
        [{name: layer[name] for name in ("down", "up")} for layer in got[-1]],
        want[-1],
        STEPS_TOLERANCE,
    )
    for layer, held in zip(got[-1], params, strict=True):
        np.testing.assert_array_equal(layer["whole"], held["whole"])


def test_averages_of_placed_weights_are_those_of_the_users(stage_mesh: Callable) -> None:
    params = low_rank_layers()
    pipeline = pipeline_of(loss_of, params, stage_mesh(2), schedule="zero_bubble")
    step, staged = pipeline.train_step(TX), pipeline.place(params)
    state, average = step.init(staged), pipeline.place(params)
    want, _ = unstaged_steps(jax.value_and_grad(loss_of), params)
    wanted = params
    for trained in want:
        staged, state, _ = step(staged, state, batch())
        average = optax.incremental_update(staged, average, 0.1)
        wanted = optax.incremental_update(trained, wanted, 0.1)
    assert_trees_close(pipeline.gather(average), wanted, STEPS_TOLERANCE)


def test_bfloat16_is_computed_in_and_float32_kept(stage_mesh: Callable) -> None:
    """Held to 8 times what the unstaged run changes when it sums its examples in other orders: the
    reverse, and four microbatches of gradients, each rounded by itself.
    """
    params, x = low_rank_layers(dtype=jnp.float32), batch(jnp.float32)

    def loss(params: Params, x: jax.Array) -> jax.Array:
        return loss_of(params, x, jnp.bfloat16)

    def accumulated(params: Params, x: jax.Array) -> Any:
        parts = [jax.value_and_grad(loss)(params, rows) for rows in jnp.split(x, 4)]
        return jax.tree.map(lambda *values: sum(values) / 4, *parts)

    want = unstaged_steps(jax.value_and_grad(loss), params, x)
    others = [
        unstaged_steps(jax.value_and_grad(loss), params, x[::-1]),
        unstaged_steps(accumulated, params, x),
    ]
    change = max(largest_difference(other, want) for other in others)
    pipeline = pipeline_of(loss, params, stage_mesh(2), remat=None)
    got = staged_steps(pipeline, params, x)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(got[0][-1]))
    assert largest_difference(got, want) <= 8 * change
    assert change < 0.1, "the orders of summation differ too much for a comparison"


def test_batch_statistics_go_on_from_step_to_step(stage_mesh: Callable) -> None:
    """Each microbatch is normalised by itself, in the order of the microbatches, as in the unstaged
    run beside.
    """
    case, steps = widened(CASES["resnet_train"]()), 5
    pipeline = stage_step(case, stage_mesh(2), 2)
    step, staged = pipeline.train_step(optax.sgd(1e-2)), pipeline.place(case.params)
    state, params = step.init(staged), case.params
    for _ in range(steps):
        staged, state, (loss, _) = step(staged, state, *case.inputs)
        run = run_unstaged(replace(case, params=params), 2)
        trees = (params, run.gradients, run.params)
        leaves = zip(pipeline.trainable, *map(jax.tree.leaves, trees), strict=True)
        moved = [x - 1e-2 * grad if is_trained else new for is_trained, x, grad, new in leaves]
        params = jax.tree.unflatten(jax.tree.structure(params), moved)
        np.testing.assert_allclose(loss, run.loss, rtol=STEPS_TOLERANCE)
    assert_trees_close(pipeline.gather(staged), params, STEPS_TOLERANCE)
