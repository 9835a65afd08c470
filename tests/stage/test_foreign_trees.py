"""Trees placed or initialized for one pipeline are refused by another, without being consumed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import layerwise_jax as lw
from layerwise_jax.schedule.generators import one_f_one_b
from tests.support.staging import assert_trees_close

WIDTH = 8
X = jnp.asarray(np.random.default_rng(0).normal(size=(8, WIDTH)), jnp.float32)
PARAMS = [
    jnp.asarray(np.random.default_rng(i).normal(size=(WIDTH, WIDTH)) / 3, jnp.float32)
    for i in range(4)
]
TX = optax.adam(1e-2)


def loss(params: list[jax.Array], x: jax.Array) -> jax.Array:
    for weight in params:
        x = jnp.tanh(x @ weight)
    return jnp.mean(x**2)


def stage(**options: Any) -> lw.Pipeline:
    """Two devices, four microbatches."""
    defaults: dict[str, Any] = {
        "reduce": "mean",
        "capacity": None,
        "mesh": lw.stage_mesh(2),
        "num_microbatches": 4,
    }
    return lw.layerwise(loss, PARAMS, X, **defaults | options)


@pytest.fixture(scope="module")
def straight() -> lw.Pipeline:
    return stage()


@pytest.fixture(scope="module")
def interleaved() -> lw.Pipeline:
    """The same number of slots of the same shapes, their rows in another order."""
    return stage(schedule="interleaved_1f1b", num_stages=4)


def test_parameters_placed_in_another_order(
    straight: lw.Pipeline, interleaved: lw.Pipeline
) -> None:
    staged = straight.place(PARAMS)
    for call in (interleaved.gather, lambda staged: interleaved.value_and_grad(staged, X)):
        with pytest.raises(ValueError, match="must be this pipeline's placed parameters"):
            call(staged)


def test_states_of_others(straight: lw.Pipeline, interleaved: lw.Pipeline, tmp_path: Path) -> None:
    step, other = straight.train_step(TX), interleaved.train_step(TX)
    staged, state = straight.place(PARAMS), step.init(straight.place(PARAMS))
    foreign = other.init(interleaved.place(PARAMS))
    for came, what in (
        (foreign, "another optimizer or pipeline"),
        (TX.init(PARAMS), "got tuple"),
        (None, "NoneType"),
    ):
        with pytest.raises(ValueError, match=rf"{what}.*place_state"):
            step(staged, came, X)
    with pytest.raises(ValueError, match="must be placed gradients"):
        step.optimizer.update(PARAMS, state, staged)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="another optimizer or pipeline"):
        lw.save_checkpoint(tmp_path, 1, straight, staged, state, optimizer=other.optimizer)
    with pytest.raises(ValueError, match=r"got TrainStep.*step\.optimizer"):
        lw.save_checkpoint(tmp_path, 1, straight, staged, state, optimizer=step)  # type: ignore[arg-type]
    lw.save_checkpoint(tmp_path, 1, straight, staged, state, optimizer=step.optimizer)
    with pytest.raises(ValueError, match="another optimizer or pipeline"):
        lw.restore_checkpoint(tmp_path, interleaved, foreign, optimizer=step.optimizer)
    found = lw.restore_checkpoint(tmp_path, interleaved, foreign, optimizer=other.optimizer)
    for got, want in zip(interleaved.gather(found.params), PARAMS, strict=True):
        np.testing.assert_array_equal(got, want)


def test_what_is_no_optimiser_for_a_step(straight: lw.Pipeline) -> None:
    with pytest.raises(ValueError, match=r"got function.*optax\.adam\(1e-3\)"):
        straight.train_step(optax.adam)
    with pytest.raises(ValueError, match=r"'value'.*between steps"):
        straight.train_step(optax.chain(optax.sgd(1e-2), optax.contrib.reduce_on_plateau()))


def test_a_state_of_the_users_outlives_the_step(straight: lw.Pipeline) -> None:
    step, own = straight.train_step(TX), TX.init(PARAMS)
    _, state, _ = step(straight.place(PARAMS), step.optimizer.place_state(own), X)
    gathered = step.optimizer.gather_state(state)
    step(straight.place(PARAMS), state, X)
    assert (int(own[0].count), int(gathered[0].count)) == (0, 1)


def test_numbers_of_numpys(straight: lw.Pipeline) -> None:
    wide = [np.asarray(weight, np.float64) for weight in PARAMS]
    pipeline = stage(num_microbatches=np.int64(4))
    value, _ = pipeline.value_and_grad(pipeline.place(wide), X)
    assert float(value) == pytest.approx(
        float(straight.value_and_grad(straight.place(PARAMS), X)[0])
    )


def test_a_table_says_how_many_microbatches() -> None:
    assert stage(schedule=one_f_one_b(2, 2), num_microbatches="auto").plan.num_microbatches == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mesh": None, "num_stages": "2"}, "num_stages must be an int .*got '2'"),
        ({"mesh": [1, 2]}, "mesh must be a jax.sharding.Mesh .* got list"),
        (
            {"device": "H100"},
            "device must be a DeviceSpec or None, got 'H100'",
        ),
        ({"capacity": True}, "capacity must be .* got True"),
    ],
)
def test_choices_of_the_wrong_kind(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        stage(**options)


def rule(backward: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """The identity, with a derivative rule of its own."""
    identity = jax.custom_vjp(lambda x: x)
    identity.defvjp(lambda x: (x, None), lambda _, g: (backward(g),))
    return identity


NOT_LINEAR: dict[str, Callable[[jax.Array], jax.Array]] = {
    "clip": lambda g: jnp.clip(g, -1e-3, 1e-3),
    "sign": jnp.sign,
    "norm": lambda g: g / (1 + jnp.linalg.norm(g)),
    "shift": lambda g: g + 1,
    "float8": lambda g: g.astype(jnp.float8_e4m3fn).astype(jnp.float32),
}


@pytest.mark.parametrize("backward", NOT_LINEAR.values(), ids=NOT_LINEAR)
def test_rules_on_weights_that_parts_of_a_gradient_do_not_add_up_through(
    backward: Callable,
) -> None:
    """One microbatch has the whole gradient; of four each would have its own clipped, say, and then
    added.
    """
    ruled = rule(backward)

    def fn(params: list[jax.Array], x: jax.Array) -> jax.Array:
        return loss([ruled(weight) for weight in params], x)

    for function in (fn, lambda params, x: ruled(loss(params, x))):
        with pytest.raises(lw.BatchError, match="derivative rule"):
            lw.layerwise(
                function, PARAMS, X, num_stages=2, num_microbatches=4, reduce="mean", capacity=None
            )
        lw.layerwise(
            function, PARAMS, X, num_stages=2, num_microbatches=1, reduce="mean", capacity=None
        )


@pytest.mark.parametrize("place", ["weights", "loss"])
def test_a_cotangent_that_each_part_would_inject_in_full_counts_once(place: str) -> None:
    """A rule that returns ones whatever comes back is off by the number of parts, and corrected."""
    ruled = rule(jnp.ones_like)

    def on_weights(params: list[jax.Array], x: jax.Array) -> jax.Array:
        return loss([ruled(weight) for weight in params], x)

    def on_loss(params: list[jax.Array], x: jax.Array) -> jax.Array:
        return ruled(loss(params, x))

    function = {"weights": on_weights, "loss": on_loss}[place]
    pipeline = lw.layerwise(function, PARAMS, X, num_stages=2, num_microbatches=4, capacity=None)
    value, grads = jax.jit(pipeline.value_and_grad)(pipeline.place(PARAMS), X)
    assert_trees_close(
        (value, pipeline.gather(grads)), jax.value_and_grad(function)(PARAMS, X), 2e-6
    )


@pytest.mark.parametrize(
    "backward", [lambda g: g, lambda g: 0.1 * g, jnp.zeros_like, lambda g: g.T.T]
)
def test_rules_on_weights_that_are_linear_stay(backward: Callable) -> None:
    ruled = rule(backward)

    def fn(params: list[jax.Array], x: jax.Array) -> jax.Array:
        return loss([ruled(jnp.round(4 * weight) / 4) for weight in params], x)

    pipeline = lw.layerwise(
        fn, PARAMS, X, num_stages=2, num_microbatches=4, reduce="mean", capacity=None
    )
    value, grads = pipeline.value_and_grad(pipeline.place(PARAMS), X)
    wanted, wanted_grads = jax.value_and_grad(fn)(PARAMS, X)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    for got, want in zip(pipeline.gather(grads), wanted_grads, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
