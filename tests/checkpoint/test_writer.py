"""Checkpoints written in the background: those of `save_checkpoint`, of arrays donated since."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import layerwise_jax as lw


def loss_fn(params: Any, x: Any) -> Any:
    for weight in params:
        x = jnp.tanh(x @ weight)
    return jnp.mean(x**2)


@pytest.fixture
def run(stage_mesh: Callable) -> Any:
    params = [jax.random.normal(key, (8, 8)) for key in jax.random.split(jax.random.key(0), 4)]
    x = jnp.ones((4, 8))
    layers = lw.trace_layers(loss_fn, params, x)
    pipeline = lw.build_pipeline(layers, (0, 2, 4), stage_mesh(2), 1, reduce="mean")
    step = pipeline.train_step(optax.adam(1e-2))
    placed = pipeline.place(params)
    return pipeline, step, placed, step.init(placed), x


def test_steps_saved_while_training_goes_on(run: Any, tmp_path: Path) -> None:
    """Every step donates what the save before it was given."""
    pipeline, step, placed, state, x = run
    expected = {}
    with lw.CheckpointWriter(tmp_path, pipeline, step.optimizer, keep=2) as writer:
        for number in range(4):
            placed, state, _ = step(placed, state, x)
            expected[number] = jax.device_get(pipeline.gather(placed))
            writer.save(number, placed, state)
    assert lw.checkpoint_steps(tmp_path) == (2, 3)
    for number in (2, 3):
        saved = lw.restore_checkpoint(
            tmp_path, pipeline, state, optimizer=step.optimizer, step=number
        )
        found = jax.device_get(pipeline.gather(saved.params))
        jax.tree.map(np.testing.assert_array_equal, found, expected[number])


def test_a_step_that_is_not_later_is_refused(run: Any, tmp_path: Path) -> None:
    pipeline, _, placed, _, _ = run
    with lw.CheckpointWriter(tmp_path, pipeline) as writer:
        writer.save(3, placed)
        with pytest.raises(ValueError, match="3"):
            writer.save(3, placed)
    assert lw.checkpoint_steps(tmp_path) == (3,)
