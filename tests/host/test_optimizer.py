"""Training by executor `host` is optax on the user's own tree."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import layerwise_jax as lw
from tests.host import models
from tests.support.host import LIGHT
from tests.support.staging import STEPS_TOLERANCE

# An optimizer that works leaf by leaf, one whose leaves share a norm, one that shares it in rounds
# of steps, and one that keeps factored moments.
OPTIMIZERS = {
    "clipped adamw": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2)),
    "finite sgd": lambda: optax.apply_if_finite(optax.sgd(0.1, momentum=0.9), 3),
    "adamw": lambda: optax.adamw(1e-2),
    "lamb": lambda: optax.lamb(1e-2),
    "adafactor": lambda: optax.adafactor(1e-2),
    "every second step": lambda: optax.MultiSteps(optax.adam(1e-2), 2),
}
IN_THE_DEFAULT_RUN = ("clipped adamw", "finite sgd")
STEPS = 4


def cases() -> list[Any]:
    return [
        pytest.param(name, marks=() if name in IN_THE_DEFAULT_RUN else pytest.mark.slow)
        for name in OPTIMIZERS
    ]


def unstaged_step(
    optimizer: Any, params: models.Params, state: Any, batch: Any
) -> tuple[Any, Any, Any]:
    """One step of the trained leaves: (parameters, state, loss)."""
    trained = {name: x for name, x in params.items() if name != "shift"}

    def loss(trained: models.Params) -> Any:
        return models.loss({**trained, "shift": params["shift"]}, *batch)[0]

    value, gradients = jax.value_and_grad(loss)(trained)
    updates, state = optimizer.update(gradients, state, trained)
    moved: Any = optax.apply_updates(trained, updates)
    return {**params, **moved}, state, value


@pytest.mark.usefixtures("float64")
def test_replicas_share_out_state(stage_mesh: Any) -> None:
    """ZeRO-1: two stages of two replicas; each replica holds half of the moments."""
    optimizer, params = OPTIMIZERS["clipped adamw"](), models.init(dtype=jnp.float64)
    layers = lw.trace_layers(models.loss, params, *(x[:2] for x in models.batch()))
    pipeline = lw.build_pipeline(
        layers,
        [0, 3, len(layers)],
        stage_mesh(2, data=2),
        2,
        reduce="mean",
        executor="host",
        xla_options=LIGHT,
    )
    step = pipeline.train_step(optimizer, shard_over_data=True)
    staged = pipeline.place(params)
    state = step.init(staged)
    want, want_state = params, optimizer.init({n: x for n, x in params.items() if n != "shift"})
    for i in range(2):
        staged, state, _ = step(staged, state, *models.batch(i))
        want, want_state, _ = unstaged_step(optimizer, want, want_state, models.batch(i))
    got = pipeline.gather(staged)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=STEPS_TOLERANCE), got, want)
    (moment, _) = state.placed["first @0" if "first @0" in state.placed else "first @1"]
    assert moment.addressable_shards[0].data.size == moment.size // 2


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", cases())
def test_steps_are_those_of_the_unstaged_function(name: str, stage_mesh: Any) -> None:
    optimizer, params = OPTIMIZERS[name](), models.init(dtype=jnp.float64)
    layers = lw.trace_layers(models.loss, params, *(x[:2] for x in models.batch()))
    mesh, choices = stage_mesh(3), {"reduce": "mean", "executor": "host", "xla_options": LIGHT}
    pipeline = lw.build_pipeline(layers, [0, 2, 4, len(layers)], mesh, 4, **choices)
    step = pipeline.train_step(optimizer)
    staged = pipeline.place(params)
    state = step.init(staged)
    first_shardings = jax.tree.map(lambda x: x.sharding, (staged, state))
    want, want_state = params, optimizer.init({n: x for n, x in params.items() if n != "shift"})
    for i in range(STEPS):
        staged, state, (loss, _) = step(staged, state, *models.batch(i))
        want, want_state, want_loss = unstaged_step(optimizer, want, want_state, models.batch(i))
        np.testing.assert_allclose(loss, want_loss, rtol=STEPS_TOLERANCE)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=STEPS_TOLERANCE),
        pipeline.gather(staged),
        want,
    )
    gathered = step.optimizer.gather_state(state)
    pairs = zip(jax.tree.leaves(gathered), jax.tree.leaves(want_state), strict=True)
    for x, y in pairs:
        np.testing.assert_allclose(x, y, atol=STEPS_TOLERANCE)
    again = step.optimizer.place_state(gathered)
    jax.tree.map(np.testing.assert_array_equal, again, state)
    # No step compiles again because of where its arguments lie.
    assert jax.tree.map(lambda x: x.sharding, (staged, state)) == first_shardings
    assert jnp.issubdtype(params["shift"].dtype, jnp.integer)  # parameters that came in still live
