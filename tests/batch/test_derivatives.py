"""Custom derivative rules: gradients of the parts add up to the unstaged ones, or are refused."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from layerwise_jax.batch.analysis import BatchError
from tests.support.batching_run import Split

BATCH, WIDTH = 8, 3

Pull = Callable[[jax.Array, jax.Array], tuple[Any, Any]]
"""(cotangent of x, x) to the gradients of (x, aux)."""


def injecting(pull: Pull) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The identity of `x`, whose rule sends a gradient into `aux` as well."""

    @jax.custom_vjp
    def inject(x: jax.Array, aux: jax.Array) -> jax.Array:
        del aux
        return x

    inject.defvjp(lambda x, aux: (x, x), lambda x, g: pull(g, x))
    return inject


ONE = injecting(lambda g, _: (g, jnp.float32(1)))
SUM_OF_COTANGENT = injecting(lambda g, _: (g, jnp.sum(g)))
SUM_OF_DATA = injecting(lambda g, x: (g, jnp.sum(x)))
NOTHING = injecting(lambda g, _: (g, jnp.float32(0)))


def model(inject: Any, auxiliary: Callable[[jax.Array], jax.Array], end: Any) -> Any:
    """Layers with an auxiliary loss of their activations, injected into the gradient."""

    def fn(params: Any, x: jax.Array) -> jax.Array:
        x = jnp.tanh(x @ params["a"])
        x = inject(x, auxiliary(x @ params["b"]))
        return end(x**2)

    return fn


def draw_params() -> dict[str, jax.Array]:
    draws = np.random.default_rng(1).standard_normal((2, WIDTH, WIDTH))
    return {name: jnp.asarray(x, jnp.float32) for name, x in zip("ab", draws, strict=True)}


def split(fn: Any, parts: int = 4) -> Split:
    x = jnp.asarray(np.random.default_rng(2).standard_normal((BATCH, WIDTH)), jnp.float32)
    return Split(fn, draw_params(), (x,), (0,), parts)


def check_gradients(run: Split, reduce: str, **options: Any) -> None:
    batching = run.analyse(reduce=reduce, **options)
    came = run.gradients_in_parts(batching)
    wanted = jax.grad(run.fn)(run.params, *run.inputs)
    for name, gradient in wanted.items():
        np.testing.assert_allclose(came[name], gradient, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(("reduce", "end"), [("mean", jnp.mean), ("sum", jnp.sum)])
@pytest.mark.parametrize(
    ("inject", "auxiliary"),
    [
        (ONE, jnp.mean),
        (ONE, jnp.sum),
        (ONE, lambda y: jnp.mean(y, 0).sum() * 3),
        (NOTHING, jnp.max),
    ],
)
def test_an_injected_loss_counts_once(inject: Any, auxiliary: Any, reduce: str, end: Any) -> None:
    check_gradients(split(model(inject, auxiliary, end)), reduce)


@pytest.mark.parametrize(
    ("inject", "auxiliary", "words"),
    [
        (SUM_OF_COTANGENT, jnp.mean, "does not treat each example by itself"),
        (SUM_OF_DATA, jnp.mean, "does not treat each example by itself"),
        (ONE, jnp.max, "injects a gradient into a value"),
        (ONE, lambda y: jnp.mean(y) * jnp.mean(y > 0), "injects a gradient into a value"),
    ],
)
@pytest.mark.parametrize("end", [jnp.mean, lambda x: x])
def test_what_parts_cannot_add_up_to_is_refused(
    inject: Any, auxiliary: Any, words: str, end: Any
) -> None:
    with pytest.raises(BatchError, match=words):
        split(model(inject, auxiliary, end)).analyse(reduce="mean")


def test_injection_into_weights_counts_once() -> None:
    check_gradients(split(lambda p, x: jnp.mean(ONE(x @ p["a"], jnp.sum(p["b"])) ** 2)), "mean")


def test_two_results_pass_their_own_cotangents() -> None:
    @jax.custom_vjp
    def twice(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        return x * weight, jnp.mean(x * weight)

    def pull(kept: Any, gs: Any) -> tuple[jax.Array, jax.Array]:
        (x, weight), (g_x, g_mean) = kept, gs
        g = g_x + g_mean / x.size
        return g * weight, jnp.sum(g * x, 0)

    twice.defvjp(lambda x, w: (twice(x, w), (x, w)), pull)

    def fn(p: Any, x: jax.Array) -> jax.Array:
        y, mean = twice(x @ p["a"], p["b"][0])
        return jnp.mean(y**2) + mean

    check_gradients(split(fn), "mean")


@jax.custom_vjp
def clip_shared(weight: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights and data as they are; the gradients of both are clipped."""
    return weight * 1, x * 1


clip_shared.defvjp(
    lambda weight, x: ((weight * 1, x * 1), None),
    lambda _, g: (jnp.clip(g[0], -0.01, 0.01), jnp.clip(g[1], -0.01, 0.01)),
)


def test_a_share_of_a_weights_gradient_is_not_clipped() -> None:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        weight, x = clip_shared(p["a"], x)
        return jnp.mean((x @ weight) ** 2)

    with pytest.raises(BatchError, match="has a derivative rule in which"):
        split(fn).analyse(reduce="mean")


def test_the_body_of_a_loop_is_refused() -> None:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        def body(x: jax.Array, _: Any) -> tuple[jax.Array, None]:
            return ONE(x @ p["a"], jnp.mean(x)), None

        return jnp.mean(lax.scan(body, x, None, length=2)[0])

    with pytest.raises(BatchError, match="does not treat each example by itself"):
        split(fn).analyse(reduce="mean")


@jax.custom_vjp
def clip_sorted(x: jax.Array) -> jax.Array:
    """A sort over the batch whose gradient is clipped, which no part's share of it is."""
    return jnp.sort(x, 0)


clip_sorted.defvjp(lambda x: (clip_sorted(x), None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))


@jax.custom_vjp
def halve_sorted(x: jax.Array) -> jax.Array:
    return jnp.sort(x, 0)


halve_sorted.defvjp(lambda x: (halve_sorted(x), None), lambda _, g: (g / 2,))


def test_statistics_pass_linear_rules_alone() -> None:
    """Under `batch_statistics` a rule that mixes examples must scale with its cotangent."""
    options = {"reduce": "mean", "statistics": "per_microbatch"}
    split(lambda p, x: jnp.mean(halve_sorted(x @ p["a"]) ** 2)).analyse(**options)
    for rule in (clip_sorted, lambda x: ONE(x, jnp.sort(x, 0)[0, 0])):
        with pytest.raises(BatchError, match="derivative rule"):
            split(lambda p, x, rule=rule: jnp.mean(rule(x @ p["a"]) ** 2)).analyse(**options)


def test_gradients_under_statistics_are_the_mean_of_the_parts() -> None:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(halve_sorted(x @ p["a"]) * jnp.arange(WIDTH))

    run = split(fn, parts=2)
    batching = run.analyse(reduce="mean", statistics="per_microbatch")
    came = run.gradients_in_parts(batching)["a"]
    halves = [jax.grad(fn)(run.params, *run.part(i))["a"] for i in range(2)]
    np.testing.assert_allclose(came, np.mean(halves, 0), rtol=1e-5, atol=1e-6)
