"""A causal transformer in Flax Linen: learned positions, pre-norm blocks, the embedding tied to the
logits.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax


class Attention(nn.Module):
    """Causal self-attention; its projections have no biases."""

    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """From and to float[batch, tokens, width]."""
        width = x.shape[-1]
        heads = (self.heads, width // self.heads)

        def project(name: str) -> jax.Array:
            return nn.DenseGeneral(heads, use_bias=False, dtype=self.dtype, name=name)(x)

        mixed = jax.nn.dot_product_attention(
            project("query"), project("key"), project("value"), is_causal=True
        )
        return nn.DenseGeneral(width, axis=(-2, -1), use_bias=False, dtype=self.dtype, name="out")(
            mixed
        )


class Block(nn.Module):
    """Attention, then a feed-forward of four times the width, each added to its own input."""

    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """From and to float[batch, tokens, width]."""
        width = x.shape[-1]
        x = x + Attention(self.heads, self.dtype, name="attention")(
            nn.LayerNorm(dtype=self.dtype, name="norm_1")(x)
        )
        wide = nn.gelu(
            nn.Dense(4 * width, dtype=self.dtype, name="up")(
                nn.LayerNorm(dtype=self.dtype, name="norm_2")(x)
            )
        )
        return x + nn.Dense(width, dtype=self.dtype, name="down")(wide)


class GPT(nn.Module):
    """A language model.

    Attributes:
      vocabulary: tokens that there are.
      width: features of a token; `heads` divides it.
      depth: blocks.
      heads: heads of attention.
      context: the most tokens that a sequence may have.
      dtype: what is computed in; parameters stay float32.
    """

    vocabulary: int
    width: int
    depth: int
    heads: int
    context: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits float[batch, tokens, vocabulary] of the next token, for int[batch, tokens]."""
        embed = nn.Embed(self.vocabulary, self.width, dtype=self.dtype, name="embed")
        positions = self.param(
            "positions", nn.initializers.normal(0.02), (self.context, self.width)
        )
        x = embed(tokens) + positions[: tokens.shape[1]].astype(self.dtype)
        for index in range(self.depth):
            x = Block(self.heads, self.dtype, name=f"block_{index}")(x)
        return embed.attend(nn.LayerNorm(dtype=self.dtype, name="norm")(x))


def next_token_loss(model: nn.Module) -> Callable[[Any, jax.Array], jax.Array]:
    """The mean cross-entropy (nats a token) of predicting each token from those before it.

    Returns:
      A function of (params, tokens), tokens being int[batch, context + 1].
    """

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        logits = jnp.asarray(model.apply(params, tokens[:, :-1]), jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    return loss
