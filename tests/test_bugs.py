"""Past bugs, one test each; kinds of faults have their own tests beside the code.

Each test is named after what went wrong, and says in its first line what users saw.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import layerwise_jax as lw
from tests.support.staging import compile_lightly

X = np.linspace(-1, 1, 32, dtype=np.float32).reshape(8, 4)


def build(fn: Any, params: Any, microbatches: int = 4, **options: Any) -> lw.Pipeline:
    layers = lw.trace_layers(fn, params, X[: 8 // microbatches])
    mesh = Mesh(jax.devices()[:2], ("stage",))
    cuts = (0, len(layers) // 2, len(layers))
    return lw.build_pipeline(layers, cuts, mesh, microbatches, **options)


def test_a_count_of_calls_was_a_count_of_microbatches() -> None:
    """After one call of four microbatches the counter was 4, and the loss another."""

    def fn(params: Any, x: jax.Array) -> Any:
        for weight in params["layers"]:
            x = x + jnp.tanh(x @ weight)
        return jnp.mean(x**2) / (1 + params["count"]), {"count": params["count"] + 1}

    params = {"layers": [jnp.eye(4), jnp.ones((4, 4)) / 3], "count": jnp.zeros(())}
    pipeline = build(fn, params, state=lambda out: out[1])
    (loss, _), staged = compile_lightly(pipeline)(pipeline.place(params), X)
    assert pipeline.gather(staged)["count"] == 1
    np.testing.assert_allclose(loss, fn(params, X)[0], rtol=1e-6)


def test_new_state_that_is_a_constant_was_dropped() -> None:
    """State that the function sets to a number kept its old value."""

    def fn(params: Any, x: jax.Array) -> Any:
        for weight in params["layers"]:
            x = jnp.tanh(x @ weight)
        return x + params["offset"], {"offset": jnp.float32(2.0)}

    params = {"layers": [jnp.eye(4), jnp.ones((4, 4)) / 3], "offset": jnp.zeros(())}
    pipeline = build(fn, params, state=lambda out: out[1])
    (out, _), staged = compile_lightly(pipeline)(pipeline.place(params), X)
    np.testing.assert_allclose(out, fn(params, X)[0], rtol=1e-6)
    assert pipeline.gather(staged)["offset"] == 2


def test_a_gradient_of_a_call_had_a_share_in_every_copy() -> None:
    """`jax.grad` of a call with a tied weight gave its first copy only one stage's share."""

    def fn(params: Any, x: jax.Array) -> jax.Array:
        return jnp.mean((jnp.tanh(x @ params["shared"] @ params["own"]) @ params["shared"].T) ** 2)

    params = {"shared": jnp.eye(4) + 0.1, "own": jnp.ones((4, 4)) / 3}
    pipeline = build(fn, params)
    got = pipeline.gather(compile_lightly(jax.grad(pipeline))(pipeline.place(params), X))
    want = jax.grad(fn)(params, X)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-7), got, want)
