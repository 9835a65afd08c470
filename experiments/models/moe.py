"""A causal transformer in Flax Linen whose feed-forwards are mixtures of experts, one expert a
token.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.gpt import Attention


class Experts(nn.Module):
    """A router and feed-forwards, of which each token takes one.

    Tokens are handed out within their own sequence, each expert taking `slack` times its fair share
    of them and no more; a token that comes too late passes unchanged, as in the Switch Transformer
    (Fedus et al. 2021). No sequence depends on another one, so that a batch may be split.

    Attributes:
      experts: how many there are.
      hidden: the hidden features of each.
      slack: room for unevenness.
      dtype: what is computed in.
    """

    experts: int
    hidden: int
    slack: float = 1.25
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """From and to float[batch, tokens, width]."""
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
    """Attention, then experts, each added to its own input."""

    heads: int
    experts: int
    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """From and to float[batch, tokens, width]."""
        x = x + Attention(self.heads, self.dtype, name="attention")(
            nn.LayerNorm(dtype=self.dtype, name="norm_1")(x)
        )
        feed_forward = Experts(self.experts, self.hidden, dtype=self.dtype, name="feed_forward")
        return x + feed_forward(nn.LayerNorm(dtype=self.dtype, name="norm_2")(x))


class MixtureOfExperts(nn.Module):
    """A language model.

    Attributes:
      vocabulary: tokens that there are.
      width: features of a token; `heads` divides it.
      depth: blocks.
      heads: heads of attention.
      experts, hidden: of every block.
      dtype: what is computed in.
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
        """Logits float[batch, tokens, vocabulary] of the next token, for int[batch, tokens]."""
        x = nn.Embed(self.vocabulary, self.width, dtype=self.dtype, name="embed")(tokens)
        for index in range(self.depth):
            x = Block(self.heads, self.experts, self.hidden, self.dtype, name=f"block_{index}")(x)
        x = nn.LayerNorm(dtype=self.dtype, name="norm")(x)
        return nn.Dense(self.vocabulary, use_bias=False, dtype=self.dtype, name="head")(x)
