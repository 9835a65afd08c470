"""A small model with all that executor `host` treats apart; compiles in a second."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

WIDTH, BATCH, VOCABULARY = 8, 8, 5
Params = dict[str, Any]


def init(seed: int = 0, dtype: Any = jnp.float32) -> Params:
    """A table tied across the ends, three layers, an integer leaf, and a leaf that nothing uses."""
    random = np.random.default_rng(seed)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(random.standard_normal(shape) / 2, dtype)

    return {
        "table": draw(VOCABULARY, WIDTH),
        "first": draw(WIDTH, WIDTH),
        "second": draw(WIDTH, WIDTH),
        "third": draw(WIDTH, WIDTH),
        "scale": draw(WIDTH),
        "shift": jnp.asarray([1], jnp.int32),
        "unused": draw(2),
    }


def loss(params: Params, tokens: jax.Array, labels: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
    """Cross-entropy with metrics on the way; a skip goes from the first layer to the last."""
    shifted = (tokens + params["shift"][0]) % VOCABULARY
    x = params["table"][shifted]  # [batch, width]
    skip = x = jnp.tanh(x @ params["first"])
    early = jnp.mean(jnp.square(x))  # a metric of an early stage: no gradient
    x = jnp.tanh(x @ params["second"]) * params["scale"]
    x = jnp.tanh(x @ params["third"]) + skip
    logits = x @ params["table"].T
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
    return -jnp.mean(picked), {"early": early, "logits": logits}


def batch(seed: int = 1) -> tuple[jax.Array, jax.Array]:
    """Tokens and labels, int32[BATCH]."""
    drawn = np.random.default_rng(seed).integers(0, VOCABULARY, (2, BATCH))
    return jnp.asarray(drawn[0], jnp.int32), jnp.asarray(drawn[1], jnp.int32)
