"""Requests: prompts with their own limits, stop sequences and keys, and their progress."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

from layerwise_jax._arguments import checked_int, checked_ints
from layerwise_jax.decode.sampling import data_of_keys


@dataclass(frozen=True)
class Request:
    """A prompt with its own limit, stop sequences and key.

    Attributes:
      prompt: int[length], at least one token.
      max_new_tokens: most new tokens; None for that of the call.
      stop_sequences: sequences of tokens, each of which ends the request when its new tokens end
        with it; in addition to those of the call. They are part of the tokens, as stop tokens are.
      key: its random key; None for that of the call, or with a greedy sampler.
    """

    prompt: Any
    max_new_tokens: int | None = None
    stop_sequences: Sequence[Sequence[int]] = ()
    key: Any = None


@dataclass(eq=False)
class Running:
    """A request and its progress.

    Attributes:
      index: of the request.
      prompt: int32[length].
      limit: most new tokens.
      stops: token sequences that end it; stop tokens are sequences of one.
      position: position of the next input.
      new: new tokens.
      is_done: whether it has ended.
      num_reported: new tokens that were streamed.
    """

    index: int
    prompt: np.ndarray
    limit: int
    stops: tuple[tuple[int, ...], ...]
    position: int = 0
    new: list[int] = field(default_factory=list)
    is_done: bool = False
    num_reported: int = 0

    @property
    def remaining(self) -> int:
        """Steps to its end if nothing stops it earlier."""
        return 0 if self.is_done else len(self.prompt) - 1 - self.position + self.limit

    def forced(self, steps: int) -> np.ndarray:
        """int32[steps]: prompt tokens that follow the next input, -1 behind the prompt's end."""
        # The next input itself is in the state already.
        ahead = self.prompt[self.position + 1 : self.position + 1 + steps]
        return np.concatenate([ahead, np.full(steps - len(ahead), -1, np.int32)])

    def take(self, tokens: np.ndarray) -> None:
        """Advance by tokens [steps], of which those inside the prompt are not new."""
        for token in tokens:
            self.position += 1
            # Tokens behind the end are of a place that waits for its next sequence.
            if self.is_done or self.position < len(self.prompt):
                continue
            self.new.append(int(token))
            # Only new tokens count: a prompt that ends with it does not end the request.
            stopped = any(tuple(self.new[-len(stop) :]) == stop for stop in self.stops)
            self.is_done = stopped or len(self.new) >= self.limit


def checked_requests(
    prompts: Sequence[Any],
    max_new_tokens: int,
    stop_sequences: Sequence[Sequence[int]],
    stop_tokens: Sequence[int],
) -> list[Running]:
    """The requests of a call, prompts and `Request`s alike.

    Raises:
      ValueError: no prompt, or one that is empty or no token ids, a limit below 1, or an empty stop
        sequence.
    """
    checked_int("max_new_tokens", max_new_tokens)
    # A stop token is a stop sequence of length 1.
    shared = (*((token,) for token in stop_tokens), *_stops("stop_sequences", stop_sequences))
    found = []
    for i, prompt in enumerate(prompts):
        request = prompt if isinstance(prompt, Request) else Request(prompt)
        limit = max_new_tokens if request.max_new_tokens is None else request.max_new_tokens
        checked_int(f"prompts[{i}].max_new_tokens", limit)
        own = _stops(f"prompts[{i}].stop_sequences", request.stop_sequences)
        found.append(Running(i, _tokens(i, request.prompt), limit, (*shared, *own)))
    if not found:
        raise ValueError("prompts must hold at least one prompt, got none.")
    return found


def checked_keys(prompts: Sequence[Any], keys: Any, draws: bool) -> np.ndarray | None:
    """Key data [prompts, ...] of the call's keys or of the requests' own; None for none.

    Raises:
      ValueError: keys are missing, given twice, or do not match the prompts.
    """
    # One key a prompt, wherever it was given.
    own = [prompt.key if isinstance(prompt, Request) else None for prompt in prompts]
    num_own = sum(key is not None for key in own)
    if keys is not None and num_own:
        raise ValueError("keys must be None where requests have keys, got both.")
    if num_own not in (0, len(own)):
        raise ValueError(f"Every request must have a key or none, got {num_own} of {len(own)}.")
    if num_own:
        keys = jnp.stack([key for key in own if key is not None])
    if keys is None and draws:
        raise ValueError(
            "keys must be a random key a prompt where the sampler draws tokens, got None. Pass "
            "keys=jax.random.split(key, len(prompts))."
        )
    return None if keys is None else data_of_keys(keys, len(prompts))


def _stops(name: str, sequences: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    found = tuple(checked_ints(f"{name}[{i}]", stop) for i, stop in enumerate(sequences))
    if () in found:
        raise ValueError(f"{name} must hold sequences of at least 1 token, got an empty one.")
    return found


def _tokens(index: int, prompt: Any) -> np.ndarray:
    tokens = np.asarray(prompt)
    if tokens.ndim != 1 or not len(tokens) or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"prompts[{index}] must be int[length] with a length of at least 1, got "
            f"{tokens.dtype}{list(tokens.shape)}."
        )
    if tokens.min() < 0 or tokens.max() > np.iinfo(np.int32).max:
        raise ValueError(
            f"prompts[{index}] must have tokens from 0 to 2**31 - 1, got {tokens.min()} to "
            f"{tokens.max()}."
        )
    return tokens.astype(np.int32)
