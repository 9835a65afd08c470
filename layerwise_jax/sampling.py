"""How the next token is drawn from logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


@dataclass(frozen=True)
class Sampler:
    """Draws tokens.

    Every sequence has a key of its own, folded with the position of the token that is drawn from, so that what a
    sequence draws does not depend on what else is in flight.

    Attributes:
      temperature: what logits are divided by; 0 for the likeliest token, which takes no key.
      top_k: how many of the likeliest tokens are drawn from; None for all.
    """

    temperature: float = 0.0
    top_k: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}; 0 (the likeliest token) or more is wanted.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; at least one token to draw from, or None for all, is wanted.")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    def __call__(self, logits: Any, keys: Any, positions: Any) -> Any:
        """The next tokens.

        Args:
          logits: float[sequences, vocabulary].
          keys: uint32[sequences, ...], the key data of every sequence.
          positions: int32[sequences], where the tokens stand that the logits come from.

        Returns:
          int32[sequences].
        """
        if self.is_greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return jax.vmap(self._draw)(logits.astype(jnp.float32), keys, positions)

    def _draw(self, logits: Any, key: Any, position: Any) -> Any:
        key = jax.random.fold_in(jax.random.wrap_key_data(key), position)
        if self.top_k is None:
            return jax.random.categorical(key, logits / self.temperature).astype(jnp.int32)
        likeliest, tokens = lax.top_k(logits, min(self.top_k, logits.shape[0]))
        return tokens[jax.random.categorical(key, likeliest / self.temperature)].astype(jnp.int32)
