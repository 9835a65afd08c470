"""nnx models: their split state is the params, and the function merges it with the graph."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tests.support.zoo_case import (
    TIME,
    VOCABULARY,
    WIDTH,
    Case,
    draw_features,
    draw_tokens,
    draw_weights,
    language_model,
    regression,
)


def split(make: Callable[[nnx.Rngs], nnx.Module]) -> tuple[Any, Any]:
    """The graph of the module that `make` gives, and its state with weights drawn."""
    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    return graph, draw_weights(state)


class MLP(nnx.Module):
    def __init__(self, widths: tuple[int, ...], rngs: nnx.Rngs):
        self.layers = nnx.List(
            [nnx.Linear(inward, outward, rngs=rngs) for inward, outward in pairwise(widths)]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers[:-1]:
            x = nnx.gelu(layer(x))
        return self.layers[-1](x)


def nnx_mlp() -> Case:
    graph, state = split(lambda rngs: MLP((7, 24, 8, 32, 16, 5, 12, 9, 3), rngs))
    return regression(
        "nnx_mlp", lambda state, x: nnx.merge(graph, state)(x), state, draw_features(7)
    )


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.attention_norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, WIDTH, decode=False, rngs=rngs)
        self.feed_forward_norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = x + self.attention(self.attention_norm(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.feed_forward_norm(x))))


class Transformer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.positions = nnx.Param(jnp.zeros((TIME, WIDTH)))
        self.blocks = nnx.List([Block(rngs) for _ in range(6)])
        self.final_norm = nnx.LayerNorm(WIDTH, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x, mask = self.embed(tokens) + self.positions[...], nnx.make_causal_mask(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.embed.attend(self.final_norm(x))


def nnx_transformer() -> Case:
    graph, state = split(Transformer)
    return language_model(
        "nnx_transformer",
        lambda state, tokens: nnx.merge(graph, state)(tokens),
        state,
        draw_tokens(),
    )


class NormedMLP(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(8)])
        self.norms = nnx.List([nnx.BatchNorm(WIDTH, rngs=rngs) for _ in range(8)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = nnx.gelu(norm(layer(x)))
        return x


def nnx_batch_norm_train() -> Case:
    graph, state = split(NormedMLP)

    def fn(state: Any, x: jax.Array) -> Any:
        model = nnx.merge(graph, state)
        return model(x), nnx.state(model, nnx.BatchStat)

    return regression(
        "nnx_batch_norm_train",
        fn,
        state,
        draw_features(WIDTH),
        state=lambda outputs: outputs[1],
        mixes_batch=True,
        tolerance=1e-4,  # eight times in a row, rounding is divided by the spread of a few examples
        notes="statistics of the batch, new running averages as a second output",
    )
