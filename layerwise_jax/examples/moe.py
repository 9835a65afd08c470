"""Causal transformer in Flax Linen with mixtures of experts, one expert per token."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from layerwise_jax.examples.gpt import Attention


class Experts(nn.Module):
    """Router and expert MLPs; every token goes to one expert.

    Routing is per sequence: an expert takes at most `slack` times its equal share of a sequence's
    tokens, and tokens beyond that skip the experts, as in the Switch Transformer (Fedus et al.
    2021). Sequences are independent, so the batch can be split into microbatches.

    Attributes:
      experts: number of experts.
      hidden: hidden features of an expert.
      slack: capacity factor of an expert.
      dtype: dtype of the computation; parameters are float32.
    """

    experts: int
    hidden: int
    slack: float = 1.25
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float[batch, tokens, width] to the same shape."""
        tokens, width = x.shape[-2:]
        room = math.ceil(self.slack * tokens / self.experts)
        initial = nn.initializers.lecun_normal(batch_axis=0)
        up = self.param("up", initial, (self.experts, width, self.hidden)).astype(self.dtype)
        down = self.param("down", initial, (self.experts, self.hidden, width)).astype(self.dtype)
        odds = nn.softmax(
            nn.Dense(self.experts, use_bias=False, dtype=self.dtype, name="router")(x)
        )
        chosen = nn.one_hot(jnp.argmax(odds, -1), self.experts, dtype=jnp.int32)
        place = jnp.cumsum(chosen, axis=-2) * chosen - 1
        # 1 where a token has a place with an expert: [batch, tokens, experts, room]
        sent = nn.one_hot(place, room, dtype=self.dtype)
        taken = jnp.einsum("bter,btd->berd", sent, x)
        done = jnp.einsum("berh,ehd->berd", nn.gelu(jnp.einsum("berd,edh->berh", taken, up)), down)
        return jnp.einsum("bter,bte,berd->btd", sent, odds, done)


class Block(nn.Module):
    """Pre-norm block: attention and experts, each with a residual connection."""

    heads: int
    experts: int
    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float[batch, tokens, width] to the same shape."""
        x = x + Attention(self.heads, self.dtype, name="attention")(
            nn.LayerNorm(dtype=self.dtype, name="norm_1")(x)
        )
        feed_forward = Experts(self.experts, self.hidden, dtype=self.dtype, name="feed_forward")
        return x + feed_forward(nn.LayerNorm(dtype=self.dtype, name="norm_2")(x))


class MixtureOfExperts(nn.Module):
    """Causal language model with experts in every block.

    Attributes:
      vocabulary: number of tokens.
      width: features per token; a multiple of `heads`.
      depth: number of blocks.
      heads: attention heads.
      experts: experts per block.
      hidden: hidden features of an expert.
      dtype: dtype of the computation; parameters are float32.
    """

    vocabulary: int
    width: int
    depth: int
    heads: int
    experts: int
    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """int[batch, tokens] to next-token logits, float[batch, tokens, vocabulary]."""
        x = nn.Embed(self.vocabulary, self.width, dtype=self.dtype, name="embed")(tokens)
        for index in range(self.depth):
            x = Block(self.heads, self.experts, self.hidden, self.dtype, name=f"block_{index}")(x)
        x = nn.LayerNorm(dtype=self.dtype, name="norm")(x)
        return nn.Dense(self.vocabulary, use_bias=False, dtype=self.dtype, name="head")(x)
