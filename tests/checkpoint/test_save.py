"""Checkpoints: what one pipeline saves another restores, bit by bit."""

from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict

from layerwise_jax.build import build_pipeline
from layerwise_jax.checkpoint.save import (
    checkpoint_steps,
    read_checkpoint,
    restore_checkpoint,
    save_checkpoint,
)
from layerwise_jax.pipeline import Pipeline
from layerwise_jax.trace.layers import trace_layers
from tests.models.checkpoint import WIDTH, X, assert_same, draw, loss, stage
from tests.models.zoo import CASES
from tests.support.staging import (
    STEPS_TOLERANCE,
    assert_trees_close,
    compile_lightly,
    even_boundaries,
    stage_case,
    stage_step,
    uneven_boundaries,
)

Norm = namedtuple("Norm", "scale steps")


MODELS = [
    ("gpt", 8),
    ("gpt_scan", 8),
    ("indexed", 8),
    ("resnet_train", 6),
    ("nnx_batch_norm_train", 8),
    ("odd_outputs", 8),
]


@pytest.mark.parametrize(("name", "many"), MODELS)
def test_saved_on_four_stages_then_two_then_many_then_none(
    name: str, many: int, stage_mesh: Callable, tmp_path: Path
) -> None:
    """Tied embeddings, stacked weights, running averages, an unused weight: every model comes back
    as it was traced.
    """
    case = CASES[name]()

    def staged_on(num_stages: int, cut: Callable, schedule: str) -> Pipeline:
        if case.state:
            return stage_step(case, stage_mesh(num_stages), 1, cut, schedule=schedule)
        return stage_case(case, case.loss_fn, stage_mesh(num_stages), 1, cut, schedule=schedule)

    four, two = staged_on(4, even_boundaries, "1f1b"), staged_on(2, uneven_boundaries, "gpipe")
    last = staged_on(many, even_boundaries, "1f1b")
    save_checkpoint(tmp_path, 4, four, four.place(case.params))
    on_two = restore_checkpoint(tmp_path, two)
    assert on_two.step == 4
    assert_same(two.gather(on_two.params), two.gather(two.place(case.params)))
    save_checkpoint(tmp_path, 5, two, on_two.params)
    on_many = restore_checkpoint(tmp_path, last).params
    assert_same(on_many, last.place(case.params))
    save_checkpoint(tmp_path, 6, last, on_many)
    assert_same(read_checkpoint(tmp_path, jax.eval_shape(lambda: case.params)).params, case.params)
    assert checkpoint_steps(tmp_path) == (4, 5, 6)
    assert_same(read_checkpoint(tmp_path, case.params, step=4).params, case.params)


def odd_params() -> Any:
    return {
        "mlp/~/linear": FrozenDict({"w": draw()[0].astype(jnp.bfloat16)}),
        "layers": (draw()[1], [draw()[2]]),
        "norm": Norm(jnp.float32(2), jnp.int8(3)),
        "keys": jax.random.split(jax.random.key(7), 2),
        "other_key": jax.random.key(8, impl="rbg"),
        "on": jnp.asarray([True, False] * 4),
    }


def odd_model(params: Any, x: jax.Array) -> jax.Array:
    noise = jax.random.normal(params["keys"][1], (WIDTH,)) + jax.random.normal(
        params["other_key"], (WIDTH,)
    )
    x = jnp.tanh(x @ params["mlp/~/linear"]["w"].astype(jnp.float32)) + noise
    x = jnp.where(params["on"], jnp.tanh(x @ params["layers"][0]), x)
    return jnp.tanh(x @ params["layers"][1][0]) * params["norm"].scale * params["norm"].steps


@pytest.mark.parametrize("num_stages", [1, 3])
def test_keys_small_types_and_containers_survive(
    num_stages: int, stage_mesh: Callable, tmp_path: Path
) -> None:
    params = odd_params()
    layers = trace_layers(odd_model, params, X)
    save_on, restore_on = (
        build_pipeline(layers, even_boundaries(len(layers), k), stage_mesh(k), 1)
        for k in (2, num_stages)
    )
    save_checkpoint(tmp_path, 0, save_on, save_on.place(params))
    restored = restore_checkpoint(tmp_path, restore_on).params
    assert_same(restored, restore_on.place(params))
    assert_same(restore_on.gather(restored), params)
    assert_same(read_checkpoint(tmp_path, params).params, params)


def test_a_model_of_one_array(stage_mesh: Callable, tmp_path: Path) -> None:
    layers = trace_layers(lambda w, x: jnp.tanh(x @ w), draw()[0], X)
    pipeline = build_pipeline(layers, (0, len(layers)), stage_mesh(1), 1)
    save_checkpoint(tmp_path, 0, pipeline, pipeline.place(draw()[0]))
    assert_same(restore_checkpoint(tmp_path, pipeline).params, pipeline.place(draw()[0]))


def train(
    value_and_grad: Callable, optimizer: Any, params: Any, state: Any, num_steps: int
) -> tuple[Any, Any]:
    @compile_lightly
    def step(params: Any, state: Any) -> tuple[Any, Any]:
        _, grads = value_and_grad(params, X.astype(jnp.float64))
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(num_steps):
        params, state = step(params, state)
    return params, state


@pytest.mark.usefixtures("float64")
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    stage_mesh: Callable, tmp_path: Path
) -> None:
    """Three steps on four stages, then three more on two by another schedule, or on none, or on
    four again.
    """
    optimizer = optax.adamw(optax.cosine_decay_schedule(1e-2, 6))
    params = draw(dtype=jnp.float64)
    whole = train(jax.value_and_grad(loss), optimizer, params, optimizer.init(params), 6)
    four = stage(stage_mesh(4), dtype=jnp.float64)
    two = stage(stage_mesh(2), 2, jnp.float64, schedule="gpipe")
    staged = four.place(params)
    staged, state = train(four.value_and_grad, optimizer, staged, optimizer.init(staged), 3)
    save_checkpoint(tmp_path, 3, four, staged, state)

    types = jax.eval_shape(lambda params: optimizer.init(two.place(params)), params)
    on_two = restore_checkpoint(tmp_path, two, types)
    ended, _ = train(two.value_and_grad, optimizer, on_two.params, on_two.optimizer_state, 3)
    assert_trees_close(two.gather(ended), whole[0], STEPS_TOLERANCE)

    alone = read_checkpoint(tmp_path, params, optimizer.init(params))
    ended = train(jax.value_and_grad(loss), optimizer, alone.params, alone.optimizer_state, 3)
    assert_trees_close(ended, whole, STEPS_TOLERANCE)

    again = restore_checkpoint(tmp_path, four, state)
    assert_same((again.params, again.optimizer_state), (staged, state))


def test_state_of_another_type_than_the_weights(stage_mesh: Callable, tmp_path: Path) -> None:
    """Moments in bfloat16, a key, a number of Python's, parts that hold nothing; replicas hold it
    all twice.
    """
    four, two = stage(stage_mesh(4)), stage(stage_mesh(2, data=2), 2)
    optimizer = optax.chain(
        optax.adam(1e-2, mu_dtype=jnp.bfloat16), optax.add_noise(1e-3, 0.5, jax.random.key(3))
    )
    staged = four.place(draw())
    _, state = train(four.value_and_grad, optimizer, staged, optimizer.init(staged), 2)
    save_checkpoint(tmp_path, 2, four, staged, (state, {"rate": 0.5}))
    on_two = restore_checkpoint(
        tmp_path, two, (optimizer.init(two.place(draw())), {"rate": 0.0})
    ).optimizer_state
    save_checkpoint(tmp_path, 3, two, two.place(draw()), on_two)
    again = restore_checkpoint(tmp_path, four, (state, {"rate": 0.0}))
    assert_same(again.optimizer_state, (state, {"rate": jnp.float32(0.5)}))
    plain = read_checkpoint(tmp_path, draw(), (optimizer.init(draw()), {"rate": 0.0}))
    assert plain.optimizer_state[0][0][0].mu[0].dtype == jnp.bfloat16


class Factored:
    """Moves a state that is one number a weight, in the order of the user's leaves."""

    def gather_state(self, state: jax.Array) -> list[jax.Array]:
        return list(state)

    def place_state(self, state: list[np.ndarray]) -> jax.Array:
        return jnp.stack(state)


def test_an_optimiser_that_moves_its_state_itself(stage_mesh: Callable, tmp_path: Path) -> None:
    pipeline = stage(stage_mesh(2))
    staged, state = pipeline.place(draw()), jnp.arange(8.0)
    save_checkpoint(tmp_path, 0, pipeline, staged, state, optimizer=Factored())
    assert_same(
        restore_checkpoint(tmp_path, pipeline, state, optimizer=Factored()).optimizer_state, state
    )
    assert_same(read_checkpoint(tmp_path, draw(), list(state)).optimizer_state, list(state))


def test_a_state_that_is_not_entry_by_entry_is_refused(
    stage_mesh: Callable, tmp_path: Path
) -> None:
    pipeline = stage(stage_mesh(2))
    staged = pipeline.place(draw())
    state = jax.eval_shape(optax.scale_by_factored_rms(min_dim_size_to_factor=1).init, staged)
    with pytest.raises(ValueError, match=r"\.v_row must have shape .* Pass optimizer="):
        save_checkpoint(tmp_path / "run", 2, pipeline, staged, state)
    assert not (tmp_path / "run").exists()
