"""How the next token is drawn from logits."""

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
    """Draws tokens.

    Every sequence has a key of its own, folded with the position of the token that is drawn from,
    so that what a sequence draws does not depend on what else is in flight.

    Attributes:
      temperature: what logits are divided by; 0 for the likeliest token, which takes no key.
      top_k: how many of the likeliest tokens are drawn from; None for all.
    """

    temperature: float = 0.0
    top_k: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.temperature, int | float | np.number) or not self.temperature >= 0:
            raise ValueError(
                f"temperature is {self.temperature!r}; 0 (the likeliest token) or more is wanted."
            )
        if self.top_k is not None:
            checked_int("top_k", self.top_k)

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


def data_of_keys(keys: Any, *shape: int) -> np.ndarray:
    """The data of random keys, or of such data itself: uint32[*shape, words of a key].

    Raises:
      ValueError: these are no keys, or keys of another number or implementation.
    """
    try:
        data = np.asarray(jax.random.key_data(keys))
    except TypeError as error:
        raise ValueError(
            f"keys came as {type(keys).__name__}; an array of random keys is wanted: "
            "jax.random.split(key, number)."
        ) from error
    one = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    if data.shape != (*shape, *one.shape):
        raise ValueError(
            f"keys came with data of the shape {list(data.shape)}; {[*shape, *one.shape]} is "
            "wanted: a random key a "
            "sequence, of JAX's default implementation."
        )
    return data
