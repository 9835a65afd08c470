"""optax on placed parameters: after some steps, what the same optimiser gives on the user's own
tree.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from jax.tree_util import keystr, tree_map_with_path

from layerwise_jax.pipeline import Pipeline
from layerwise_jax.train.optimizer import stage_optimizer
from layerwise_jax.train.step import train_step
from tests.models.zoo import CASES, Case
from tests.support.staging import (
    STEPS_TOLERANCE,
    assert_trees_close,
    compile_lightly,
    stage_case,
    widened,
)

pytestmark = pytest.mark.usefixtures("float64")

STEPS = 20


def matrices(params: Any) -> Any:
    return jax.tree.map(lambda x: x.ndim > 1, params)


def kernels(params: Any) -> Any:
    return tree_map_with_path(lambda path, _: "kernel" in keystr(path), params)


def labels(params: Any) -> Any:
    return tree_map_with_path(lambda path, _: "norm" if "Norm" in keystr(path) else "rest", params)


OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "decay_by_ndim": lambda: optax.adamw(1e-3, weight_decay=0.1, mask=matrices),
    "decay_by_path": lambda: optax.adamw(1e-3, weight_decay=0.1, mask=kernels),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(0.05), optax.adamw(1e-3, eps=1e-3)),
    "adafactor": lambda: optax.adafactor(1e-3, min_dim_size_to_factor=8),
    "lamb": lambda: optax.lamb(1e-3, eps=1e-3),
    "block_rms": lambda: optax.chain(optax.clip_by_block_rms(0.001), optax.sgd(0.1, momentum=0.9)),
    "multi_transform": lambda: optax.multi_transform(
        {"norm": optax.sgd(0.1), "rest": optax.adam(1e-3)}, labels
    ),
    "accumulated": lambda: optax.MultiSteps(
        optax.adam(1e-3, eps=1e-3), 2
    ).gradient_transformation(),
    "if_finite": lambda: optax.apply_if_finite(optax.adam(1e-3, eps=1e-3), 3),
    "scheduled": lambda: optax.inject_hyperparams(optax.adamw)(
        optax.cosine_decay_schedule(1e-3, 10), eps=1e-3
    ),
    "average": lambda: optax.chain(optax.sgd(0.1), optax.ema(0.9)),
}


@functools.cache
def pipeline_of(name: str, mesh: Any) -> tuple[Case, Pipeline]:
    case = widened(CASES[name]())
    return case, stage_case(case, case.loss_fn, mesh, 2)


def draw_gradients(params: Any, seed: int = 0) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [
        jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), params)
        for _ in range(STEPS)
    ]


def check(case: Case, pipeline: Pipeline, tx: optax.GradientTransformation, **options: Any) -> Any:
    """The same gradients, staged and not: equal parameters and equal state. Returns the placed
    state.
    """
    staged_tx = pipeline.optimizer(tx, **options)

    @compile_lightly
    def unstaged(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    @compile_lightly
    def staged(grads: Any, state: Any, placed: Any) -> tuple[Any, Any]:
        updates, state = staged_tx.update(pipeline.place(grads), state, placed)
        return optax.apply_updates(placed, updates), state

    params, placed = case.params, pipeline.place(case.params)
    state, placed_state = compile_lightly(tx.init)(params), compile_lightly(staged_tx.init)(placed)
    for grads in draw_gradients(params):
        params, state = unstaged(grads, state, params)
        placed, placed_state = staged(grads, placed_state, placed)
    assert_trees_close(pipeline.gather(placed), params, STEPS_TOLERANCE)
    gathered = staged_tx.gather_state(placed_state)
    assert jax.tree.structure(gathered) == jax.tree.structure(state)
    assert_trees_close(gathered, state, STEPS_TOLERANCE)
    return placed_state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equal_with_tied_weights(name: str, stage_mesh: Callable) -> None:
    """One block's weights on every stage, an embedding on the first, a head on the last."""
    case, pipeline = pipeline_of("shared_blocks", stage_mesh(2))
    check(case, pipeline, OPTIMIZERS[name]())


@pytest.mark.parametrize("name", ["clipped", "decay_by_ndim", "lamb"])
def test_equal_on_stacked_layers(name: str, stage_mesh: Callable) -> None:
    """Leaves whose slices live on several stages: elementwise operations and norms."""
    case, pipeline = pipeline_of("gpt_scan", stage_mesh(2))
    check(case, pipeline, OPTIMIZERS[name]())


def test_refuses_what_needs_a_stacked_leaf_whole(stage_mesh: Callable) -> None:
    case, pipeline = pipeline_of("gpt_scan", stage_mesh(2))
    tx = stage_optimizer(
        pipeline.placement, pipeline.trainable, pipeline.mesh, OPTIMIZERS["adafactor"]()
    )
    placed = pipeline.place(case.params)
    state = tx.init(placed)
    with pytest.raises(ValueError, match="stacked and live on several stages"):
        tx.update(placed, state, placed)


def test_refuses_large_values_of_several_parameters(stage_mesh: Callable) -> None:
    def mix(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        total = sum(x for x in jax.tree.leaves(grads) if x.shape == (16, 32))
        return jax.tree.map(lambda x: x * jnp.sum(total), grads), state

    _, pipeline = pipeline_of("gpt", stage_mesh(2))
    tx = optax.GradientTransformation(lambda params: (), mix)
    with pytest.raises(ValueError, match=r"optimizer must combine parameters .* got add at"):
        stage_optimizer(pipeline.placement, pipeline.trainable, pipeline.mesh, tx)


def test_state_moves_between_numbers_of_stages(stage_mesh: Callable) -> None:
    case, two = pipeline_of("gpt", stage_mesh(2))
    four = stage_case(case, case.loss_fn, stage_mesh(4), 2)
    tx = OPTIMIZERS["adafactor"]()
    first, second = (stage_optimizer(p.placement, p.trainable, p.mesh, tx) for p in (two, four))
    placed = two.place(case.params)
    _, state = first.update(two.place(draw_gradients(case.params)[0]), first.init(placed), placed)
    gathered = first.gather_state(state)
    again = second.gather_state(second.place_state(gathered))
    jax.tree.map(np.testing.assert_array_equal, gathered, again)


def test_state_is_shared_out_over_replicas(stage_mesh: Callable) -> None:
    case = widened(CASES["gpt"]())
    pipeline = stage_case(case, case.loss_fn, stage_mesh(2, data=2), 2)
    adam = OPTIMIZERS["clipped"]()
    whole, shared = (
        held_bytes(check(case, pipeline, adam, shard_over_data=x)) for x in (False, True)
    )
    assert shared <= 0.55 * whole


def held_bytes(state: Any) -> int:
    """Bytes of placed state on the first device."""
    device = jax.devices()[0]
    arrays = jax.tree.leaves(state.placed)
    return sum(s.data.nbytes for x in arrays for s in x.addressable_shards if s.device == device)


def test_a_step_trains_as_the_unstaged_function(stage_mesh: Callable) -> None:
    """Real gradients, clipped, with the tied embedding; donated buffers."""
    case, pipeline = pipeline_of("gpt", stage_mesh(2))
    tx = OPTIMIZERS["clipped"]()
    step = train_step(pipeline, tx)
    staged = pipeline.place(case.params)
    state = step.init(staged)

    @compile_lightly
    def unstaged(params: Any, state: Any) -> tuple[Any, Any, Any]:
        value, grads = jax.value_and_grad(case.loss_fn)(params, *case.inputs)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    params, wanted = case.params, tx.init(case.params)
    for _ in range(STEPS):
        staged, state, value = step(staged, state, *case.inputs)
        params, wanted, loss = unstaged(params, wanted)
        np.testing.assert_allclose(value, loss, rtol=STEPS_TOLERANCE)
    assert_trees_close(pipeline.gather(staged), params, STEPS_TOLERANCE)


def test_flax_train_state(stage_mesh: Callable) -> None:
    case, pipeline = pipeline_of("gpt", stage_mesh(2))
    tx = stage_optimizer(pipeline.placement, pipeline.trainable, pipeline.mesh, optax.sgd(0.5))
    placed = pipeline.place(case.params)
    state = TrainState.create(apply_fn=pipeline, params=placed, tx=tx)
    state = state.apply_gradients(grads=placed)
    assert_trees_close(
        pipeline.gather(state.params), jax.tree.map(lambda x: 0.5 * x, case.params), 1e-6
    )
