"""Derivatives of a call are the function's, with tied weights too: reverse, forward, and twice."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import layerwise_jax as lw
from tests.support.staging import compile_lightly

WIDTH, BATCH = 4, 8
KEYS = jax.random.split(jax.random.key(0), 8)


def draw(key: jax.Array, *shape: int) -> jax.Array:
    return jax.random.normal(key, shape) / 2


# `shared` is used by every stage, `table` by the first and the last, `own` by one stage each.
PARAMS = {
    "shared": draw(KEYS[0], WIDTH, WIDTH),
    "table": draw(KEYS[1], WIDTH, WIDTH),
    "own": [draw(key, WIDTH, WIDTH) for key in KEYS[2:6]],
}
TANGENT = jax.tree.map(lambda x: jnp.cos(3 * x), PARAMS)
X = draw(KEYS[6], BATCH, WIDTH)


def features(params: dict[str, Any], x: jax.Array) -> jax.Array:
    x = x @ params["table"]
    for weight in params["own"]:
        x = x + jnp.tanh(x @ weight @ params["shared"])
    return x @ params["table"].T


def loss(params: dict[str, Any], x: jax.Array) -> jax.Array:
    return jnp.mean(features(params, x) ** 2)


LAYOUTS = {
    "2 stages": {"num_stages": 2, "num_microbatches": 2},
    "4 stages": {"num_stages": 4, "num_microbatches": 4},
    "2 replicas": {"data": 2, "num_microbatches": 2},
    "4 stages on 2 devices": {
        "num_stages": 4,
        "data": 1,
        "num_microbatches": 2,
        "schedule": "interleaved_1f1b",
    },
}


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in list(LAYOUTS)[1:3]]


@pytest.fixture(params=["2 stages", *SLOW, "4 stages on 2 devices"])
def stage(
    request: pytest.FixtureRequest, stage_mesh: Callable[..., Mesh]
) -> Callable[..., lw.Pipeline]:
    """Stages a function in one of the layouts."""
    options = dict(LAYOUTS[request.param])
    data = options.pop("data", None)
    mesh = None if data is None else stage_mesh(2, data=data)

    def build(fn: Callable[..., Any], **more: Any) -> lw.Pipeline:
        return lw.layerwise(fn, PARAMS, X, mesh=mesh, capacity=None, **options, **more)

    return build


def close(got: Any, want: Any) -> None:
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=2e-4, atol=2e-5), got, want)


def test_gradients_of_a_call(stage: Callable[..., lw.Pipeline]) -> None:
    pipeline = stage(loss, reduce="mean")
    staged = pipeline.place(PARAMS)
    want = jax.grad(loss)(PARAMS, X)
    got = compile_lightly(jax.grad(pipeline))(staged, X)
    close(pipeline.gather(got), want)
    for weight, places in pipeline.placement.copies().items():
        copies = [np.asarray(got[pipeline.placement.slots[j].name])[row] for j, row in places]
        close(copies, [jax.tree.leaves(want)[weight.leaf]] * len(copies))
    assert any(len(places) > 1 for places in pipeline.placement.copies().values())


def test_products_with_jacobians_of_a_call(stage: Callable[..., lw.Pipeline]) -> None:
    pipeline = stage(features)
    staged, cotangent = pipeline.place(PARAMS), jnp.sin(X)
    tangents = pipeline.place(TANGENT), jnp.sin(X)
    pulled, pushed = compile_lightly(
        lambda staged: (
            jax.vjp(pipeline, staged, X)[1](cotangent),
            jax.jvp(pipeline, (staged, X), tangents),
        )
    )(staged)
    close((pipeline.gather(pulled[0]), pulled[1]), jax.vjp(features, PARAMS, X)[1](cotangent))
    close(pushed, jax.jvp(features, (PARAMS, X), (TANGENT, jnp.sin(X))))


def test_jacobians_of_a_call() -> None:
    def first_example(params: dict[str, Any], x: jax.Array) -> jax.Array:
        return jnp.mean(features(params, x) ** 2)

    pipeline = lw.layerwise(
        first_example, PARAMS, X, reduce="mean", num_stages=2, num_microbatches=2, capacity=None
    )
    staged, want = pipeline.place(PARAMS), jax.grad(first_example)(PARAMS, X)
    for jacobian in (jax.jacrev, jax.jacfwd):
        close(pipeline.gather(compile_lightly(jacobian(pipeline))(staged, X)), want)
    rows = lw.layerwise(features, PARAMS, X[:2], num_stages=2, num_microbatches=2, capacity=None)
    got = compile_lightly(jax.jacrev(rows))(rows.place(PARAMS), X[:2])
    want = jax.jacrev(features)(PARAMS, X[:2])
    close(jax.vmap(jax.vmap(rows.gather))(got), want)


def test_second_derivatives_of_a_call() -> None:
    """Forward over reverse and reverse over reverse: products with the Hessian."""
    pipeline = lw.layerwise(
        loss, PARAMS, X, reduce="mean", num_stages=2, num_microbatches=2, capacity=None
    )
    staged, tangent = pipeline.place(PARAMS), pipeline.place(TANGENT)
    want = jax.jvp(lambda p: jax.grad(loss)(p, X), (PARAMS,), (TANGENT,))[1]
    got = compile_lightly(
        lambda staged: jax.jvp(lambda p: jax.grad(pipeline)(p, X), (staged,), (tangent,))[1]
    )(staged)
    close(pipeline.gather(got), want)

    def along(gradient: Callable[..., Any], params: Any, tangent: Any) -> jax.Array:
        parts = jax.tree.map(jnp.vdot, gradient(params, X), tangent)
        return jnp.asarray(sum(jax.tree.leaves(parts)))

    def gathered(params: Any, x: jax.Array) -> Any:
        return pipeline.gather(jax.grad(pipeline)(pipeline.place(params), x))

    got = compile_lightly(jax.grad(lambda p: along(gathered, p, TANGENT)))(PARAMS)
    close(got, want)
