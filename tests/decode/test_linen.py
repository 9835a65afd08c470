"""The decode ring with a Linen model's own caches, made by `decode=True`."""

from collections.abc import Callable
from functools import partial
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


class ScannedBlock(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return Block()(x), None


class LanguageModel(nn.Module):
    layers: int
    is_scan: bool

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(VOCABULARY, WIDTH)(tokens)
        if self.is_scan:  # which stacks caches and counters over layers
            axes, keys = {"params": 0, "cache": 0}, {"params": True}
            x, _ = nn.scan(ScannedBlock, variable_axes=axes, split_rngs=keys, length=self.layers)()(
                x, None
            )
        for _ in range(0 if self.is_scan else self.layers):
            x = Block()(x)
        return nn.Dense(VOCABULARY)(nn.LayerNorm()(x))


def step(
    model: nn.Module, params: Any, cache: Any, tokens: jax.Array, positions: jax.Array
) -> tuple[jax.Array, Any]:
    logits, new = model.apply(
        {"params": params, "cache": cache}, tokens[:, None], mutable=["cache"]
    )
    return logits[:, 0], new["cache"]


def unstaged(
    run: Callable[..., Any], params: Any, cache: Any, prompts: np.ndarray
) -> list[list[int]]:
    """The sequences of one group, a token at a time."""
    new = []
    tokens, length = prompts[:, 0], prompts.shape[1]
    for position in range(length + NEW - 1):
        logits, cache = run(params, cache, jnp.asarray(tokens), jnp.full(len(tokens), position))
        drawn = np.asarray(logits.argmax(-1))
        tokens = prompts[:, position + 1] if position + 1 < length else drawn
        if position + 1 >= length:
            new.append(drawn)
    return np.stack(new, axis=1).tolist()


@pytest.mark.parametrize(("is_scan", "num_stages"), [(False, 1), (False, 4), (True, 3)])
def test_tokens_are_those_of_the_unstaged_loop(is_scan: bool, num_stages: int) -> None:
    model = LanguageModel(4, is_scan)
    variables, step_fn = (
        model.init(jax.random.key(0), jnp.zeros((SEQUENCES, CONTEXT), jnp.int32)),
        partial(step, model),
    )
    params, cache = variables["params"], jax.tree.map(jnp.zeros_like, variables["cache"])
    ring = lw.decode_ring(step_fn, params, cache, group_size=SEQUENCES, num_stages=num_stages)
    prompts = np.random.default_rng(0).integers(0, VOCABULARY, (ring.num_sequences, 3))
    generation, run = ring.generate(ring.place(params), list(prompts), NEW), jax.jit(step_fn)
    want = [
        tokens
        for group in prompts.reshape(-1, SEQUENCES, 3)
        for tokens in unstaged(run, params, cache, group)
    ]
    assert [tokens.tolist() for tokens in generation.tokens] == want
    assert ring.plan.bubble_share == 0
    assert not ring.sequences_are_independent  # the sequences of a group share `cache_index`
