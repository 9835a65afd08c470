"""Sampling of the next token from logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from layerwise_jax._arguments import checked_int


@dataclass(frozen=True)
class Sampler:
    """Draws tokens, each sequence with its own random key.

    The key is folded with the position of the token that the logits come from, so the tokens of a
    sequence do not depend on what else is in flight.

    Attributes:
      temperature: divides the logits; 0 takes the likeliest token and needs no key.
      top_k: the number of likeliest tokens that are drawn from; None for all.

    Raises:
      ValueError: temperature is negative or no number, or top_k is no positive int.
    """

    temperature: float = 0.0
    top_k: int | None = None

    def __post_init__(self) -> None:
        is_number = isinstance(self.temperature, int | float | np.number)
        if not is_number or not self.temperature >= 0:
            raise ValueError(
                f"temperature must be a number of at least 0, got {self.temperature!r}. 0 takes "
                "the likeliest token."
            )
        if self.top_k is not None:
            checked_int("top_k", self.top_k)

    @property
    def is_greedy(self) -> bool:
        """True if the likeliest token is taken, without a key."""
        return self.temperature == 0

    def __call__(self, logits: Any, keys: Any, positions: Any) -> Any:
        """The next tokens.

        Args:
          logits: float[sequences, vocabulary].
          keys: uint32[sequences, ...], key data.
          positions: int32[sequences], positions of the tokens that the logits come from.

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
        # top_logits and top_tokens: [min(top_k, vocabulary)], the likeliest first.
        top_logits, top_tokens = lax.top_k(logits, min(self.top_k, logits.shape[0]))
        drawn = jax.random.categorical(key, top_logits / self.temperature)
        return top_tokens[drawn].astype(jnp.int32)


def data_of_keys(keys: Any, *shape: int) -> np.ndarray:
    """The data of random keys, uint32[*shape, words of a key]; key data is taken as it is.

    Raises:
      ValueError: no keys, or keys of another shape or implementation.
    """
    try:
        data = np.asarray(jax.random.key_data(keys))
    except TypeError as error:
        raise ValueError(
            f"keys must be an array of random keys, got {type(keys).__name__}. Make it with "
            "jax.random.split(key, number)."
        ) from error
    one = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    if data.shape != (*shape, *one.shape):
        raise ValueError(
            f"keys must have data of shape {[*shape, *one.shape]}, got {list(data.shape)}: one key "
            "a sequence, of JAX's default implementation."
        )
    return data
