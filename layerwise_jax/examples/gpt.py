"""Causal transformer in Flax Linen: learned positions, pre-norm blocks, tied embedding."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax


class Attention(nn.Module):
    """Causal self-attention without biases."""

    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float[batch, tokens, width] to the same shape."""
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
    """Pre-norm block: attention and an MLP, each with a residual connection."""

    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float[batch, tokens, width] to the same shape."""
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
    """Causal language model whose embedding is also its output projection.

    Attributes:
      vocabulary: number of tokens.
      width: features per token; a multiple of `heads`.
      depth: number of blocks.
      heads: attention heads.
      context: maximum length of a sequence.
      dtype: dtype of the computation; parameters are float32.
    """

    vocabulary: int
    width: int
    depth: int
    heads: int
    context: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """int[batch, tokens] to next-token logits, float[batch, tokens, vocabulary]."""
        embed = nn.Embed(self.vocabulary, self.width, dtype=self.dtype, name="embed")
        positions = self.param(
            "positions", nn.initializers.normal(0.02), (self.context, self.width)
        )
        x = embed(tokens) + positions[: tokens.shape[1]].astype(self.dtype)
        for index in range(self.depth):
            x = Block(self.heads, self.dtype, name=f"block_{index}")(x)
        return embed.attend(nn.LayerNorm(dtype=self.dtype, name="norm")(x))


def next_token_loss(model: nn.Module) -> Callable[[Any, jax.Array], jax.Array]:
    """Mean cross-entropy of next-token prediction, in nats per token.

    Returns:
      Function of (params, tokens), tokens int[batch, context + 1], that returns a scalar.
    """

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        logits = jnp.asarray(model.apply(params, tokens[:, :-1]), jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    return loss
