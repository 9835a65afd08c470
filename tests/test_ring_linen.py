"""The decode ring with a Linen model's own caches, made by `decode=True`."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layerwise_jax as lw

VOCABULARY, WIDTH, CONTEXT, SEQUENCES, NEW = 31, 16, 12, 2, 5


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, decode=True)(nn.LayerNorm()(x))
        return x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(2 * WIDTH)(nn.LayerNorm()(x))))


class LanguageModel(nn.Module):
    layers: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(VOCABULARY, WIDTH)(tokens)
        for _ in range(self.layers):
            x = Block()(x)
        return nn.Dense(VOCABULARY)(nn.LayerNorm()(x))


MODEL = LanguageModel(layers=4)


def step(params: Any, cache: Any, tokens: jax.Array, positions: jax.Array) -> tuple[jax.Array, Any]:
    logits, new = MODEL.apply({"params": params, "cache": cache}, tokens[:, None], mutable=["cache"])
    return logits[:, 0], new["cache"]


def unstaged(params: Any, cache: Any, prompts: np.ndarray) -> list[list[int]]:
    """The sequences of one group, a token at a time."""
    run, new = jax.jit(step), []
    tokens, length = prompts[:, 0], prompts.shape[1]
    for position in range(length + NEW - 1):
        logits, cache = run(params, cache, jnp.asarray(tokens), jnp.full(len(tokens), position))
        drawn = np.asarray(logits.argmax(-1))
        tokens = prompts[:, position + 1] if position + 1 < length else drawn
        if position + 1 >= length:
            new.append(drawn)
    return np.stack(new, axis=1).tolist()


@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_tokens_are_those_of_the_unstaged_loop(num_stages: int) -> None:
    variables = MODEL.init(jax.random.key(0), jnp.zeros((SEQUENCES, CONTEXT), jnp.int32))
    params, cache = variables["params"], jax.tree.map(jnp.zeros_like, variables["cache"])
    ring = lw.decode_ring(step, params, cache, group_size=SEQUENCES, num_stages=num_stages)
    prompts = np.random.default_rng(0).integers(0, VOCABULARY, (ring.num_sequences, 3))
    generation = ring.generate(ring.place(params), list(prompts), NEW)
    want = [tokens for group in prompts.reshape(-1, SEQUENCES, 3) for tokens in unstaged(params, cache, group)]
    assert [tokens.tolist() for tokens in generation.tokens] == want
    assert ring.plan.bubble_share == 0
    assert not ring.keeps_rows  # the sequences of a group share `cache_index`
