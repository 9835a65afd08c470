"""Generation for any number of prompts: sequences take places in the ring and leave them when they
end (continuous batching).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import Progress

from layerwise_jax import processes
from layerwise_jax._arguments import checked_int
from layerwise_jax.decode.sampling import data_of_keys
from layerwise_jax.stage.placement import Staged


class Ring(Protocol):
    """The part of `DecodeRing` that generation uses."""

    @property
    def num_groups(self) -> int: ...

    @property
    def num_sequences(self) -> int: ...

    @property
    def sequences_are_independent(self) -> bool: ...

    @property
    def stop_tokens(self) -> tuple[int, ...]: ...

    @property
    def prefill_length(self) -> int: ...

    group_size: int
    draws: bool

    def start(self, tokens: Any, positions: Any, keys: Any) -> Any: ...

    def compiled(self, staged: Staged, places: Any, steps: int) -> Any: ...

    def restart(self, places: Any, mask: Any, tokens: Any, positions: Any, keys: Any) -> Any: ...

    def compiled_prefill(self, staged: Staged, places: Any) -> Any: ...

    def prefill(
        self, staged: Staged, places: Any, prompts: Any, lengths: Any, following: Any
    ) -> tuple[Any, np.ndarray]: ...

    def __call__(self, staged: Staged, places: Any, forced: Any) -> tuple[Any, np.ndarray]: ...


@dataclass(frozen=True)
class Generation:
    """New tokens of every prompt, and times without compilation.

    Attributes:
      tokens: int32[new tokens] for every prompt.
      steps: steps of every group, including those in which prompts were read.
      seconds: seconds of all steps.
      prefill_seconds: seconds in which prompts were read at once.
    """

    tokens: tuple[np.ndarray, ...]
    steps: int
    seconds: float
    prefill_seconds: float = 0.0

    @property
    def num_tokens(self) -> int:
        """New tokens of all sequences."""
        return sum(len(tokens) for tokens in self.tokens)

    @property
    def tokens_per_second(self) -> float:
        """TPS: new tokens of all sequences per second, prefill included."""
        return self.num_tokens / (self.seconds + self.prefill_seconds)

    @property
    def seconds_per_token(self) -> float:
        """1 / TPS. A reader waits longer for the next token: see `inter_token_latency`."""
        return 1 / self.tokens_per_second

    @property
    def inter_token_latency(self) -> float:
        """Seconds between two tokens of one sequence: one step, which gives each sequence one."""
        return self.seconds / max(self.steps, 1)

    def __str__(self) -> str:
        return (
            f"{self.num_tokens:,} tokens of {len(self.tokens)} sequences in "
            f"{self.seconds + self.prefill_seconds:.3f} s: "
            f"{self.tokens_per_second:,.1f} tokens/s (1/TPS {self.seconds_per_token * 1e3:.4f} "
            "ms), "
            f"{self.inter_token_latency * 1e3:.3f} ms between two tokens of a sequence"
        )


@dataclass(eq=False)
class _Running:
    """A prompt and its progress.

    Attributes:
      index: of the prompt.
      prompt: int32[length].
      position: position of the next input.
      new: new tokens.
      is_done: whether a stop token or the limit was reached.
    """

    index: int
    prompt: np.ndarray
    position: int = 0
    new: list[int] = field(default_factory=list)
    is_done: bool = False

    def remaining(self, max_new_tokens: int) -> int:
        """Steps to its end without a stop token."""
        return 0 if self.is_done else len(self.prompt) - 1 - self.position + max_new_tokens

    def forced(self, steps: int) -> np.ndarray:
        """int32[steps]: prompt tokens that follow the next input, -1 behind the prompt's end."""
        ahead = self.prompt[self.position + 1 : self.position + 1 + steps]
        return np.concatenate([ahead, np.full(steps - len(ahead), -1, np.int32)])

    def take(self, tokens: np.ndarray, max_new_tokens: int, stop_tokens: Sequence[int]) -> None:
        """Advance by tokens [steps], of which those inside the prompt are not new."""
        for token in tokens:
            self.position += 1
            if self.is_done or self.position < len(self.prompt):
                continue
            self.new.append(int(token))
            self.is_done = len(self.new) >= max_new_tokens or int(token) in stop_tokens


def generate(
    ring: Ring,
    staged: Staged,
    prompts: Sequence[Any],
    max_new_tokens: int,
    keys: Any = None,
    steps_per_call: int = 64,
    progress: bool = False,
) -> Generation:
    """Generate up to `max_new_tokens` for every prompt; a stop token ends a sequence earlier.

    A sequence that ends gives its place to the next prompt. Where a group shares a part of its
    cache (a counter), all of the group end before new sequences start. Prompts are read one token a
    step, unless the ring has a `prefill_fn`: it reads the prompts of a group at once if all its
    sequences are new, up to `prefill_length` tokens. Where the group shares a part of its cache,
    all prompts must be at least that long.

    Args:
      ring: the ring.
      staged: its placed parameters.
      prompts: int[length] each, any lengths and number.
      max_new_tokens: most new tokens of a sequence.
      keys: a random key a prompt; None for a greedy sampler.
      steps_per_call: steps of a program call, between which ended sequences are replaced.
      progress: whether to show a progress bar.

    Raises:
      ValueError: no prompt, an empty one or one that is no token ids, a limit below 1, or keys that
        are missing or do not match the prompts.
    """
    waiting = [_Running(i, _tokens(i, prompt)) for i, prompt in enumerate(prompts)]
    key_data = _check(
        ring, waiting, keys, max_new_tokens=max_new_tokens, steps_per_call=steps_per_call
    )
    queue = iter(waiting)
    places: list[_Running | None] = [next(queue, None) for _ in range(ring.num_sequences)]
    reader = _Reader(ring, staged, max_new_tokens)
    held = ring.start(*_first(ring, places, key_data))
    held = reader.read(held, places, np.asarray([sequence is not None for sequence in places]))
    held = reader.replace(held, places, queue, key_data)
    longest = max(sequence.remaining(max_new_tokens) for sequence in waiting)
    steps = max(1, min(steps_per_call, longest))
    ring.compiled(staged, held, steps)
    calls, seconds = 0, 0.0
    with Progress(disable=not progress) as bar:
        task = bar.add_task("tokens", total=max_new_tokens * len(waiting))
        while any(sequence and not sequence.is_done for sequence in places):
            started = processes.stopwatch()
            held, tokens = ring(staged, held, _forced(ring, places, steps))
            seconds += processes.stopwatch() - started
            calls += 1
            for sequence, row in zip(
                places, np.moveaxis(tokens, 0, -1).reshape(len(places), steps), strict=True
            ):
                if sequence:
                    sequence.take(row, max_new_tokens, ring.stop_tokens)
            bar.update(task, completed=sum(len(sequence.new) for sequence in waiting))
            held = reader.replace(held, places, queue, key_data)
    tokens = tuple(np.asarray(sequence.new, np.int32) for sequence in waiting)
    return Generation(tokens, calls * steps, seconds, reader.seconds)


@dataclass(eq=False)
class _Reader:
    """Puts sequences into places and reads their prompts at once where the ring can.

    Attributes:
      seconds: time spent reading.
    """

    ring: Ring
    staged: Staged
    max_new_tokens: int
    seconds: float = 0.0

    def replace(
        self,
        held: Any,
        places: list[_Running | None],
        queue: Iterator[_Running],
        key_data: np.ndarray | None,
    ) -> Any:
        """The ring state with ended sequences replaced by the next ones."""
        # A sequence may end with the token that reading its prompt gives, so look again.
        while (mask := _replace(self.ring, places, queue)).any():
            held = self.ring.restart(held, mask, *_first(self.ring, places, key_data))
            held = self.read(held, places, mask.reshape(-1))
        return held

    def read(self, held: Any, places: Sequence[_Running | None], is_new: np.ndarray) -> Any:
        """The ring state after reading the prompts of groups whose sequences are all new."""
        shape = (self.ring.num_groups, self.ring.group_size)
        is_old = [
            s is not None and not s.is_done and not new
            for s, new in zip(places, is_new, strict=True)
        ]
        # [groups], and lengths [groups, sequences]
        reads = is_new.reshape(shape).any(axis=1) & ~np.asarray(is_old).reshape(shape).any(axis=1)
        of_new = [sequence if new else None for sequence, new in zip(places, is_new, strict=True)]
        longest = self.ring.prefill_length
        lengths = np.asarray(
            [min(len(s.prompt), longest) if s else longest for s in of_new]
        ).reshape(shape)
        if not self.ring.sequences_are_independent:
            reads &= (lengths == longest).all(axis=1)
        if not longest or not reads.any():
            return held
        lengths = np.where(reads[:, None], lengths, 0)
        prompts, following = self._prompts(of_new, lengths.reshape(-1))
        self.ring.compiled_prefill(self.staged, held)
        started = processes.stopwatch()
        held, tokens = self.ring.prefill(
            self.staged, held, prompts.reshape(*shape, -1), lengths, following.reshape(shape)
        )
        self.seconds += processes.stopwatch() - started
        for sequence, token, length in zip(
            of_new, tokens.reshape(-1), lengths.reshape(-1), strict=True
        ):
            if sequence and length:
                sequence.position = int(length) - 1
                sequence.take(token[None], self.max_new_tokens, self.ring.stop_tokens)
        return held

    def _prompts(
        self, sequences: Sequence[_Running | None], lengths: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """int32[sequences, prefill_length], zero-padded, and int32[sequences]: the prompt's token
        behind those, or -1.
        """
        prompts = np.zeros((len(sequences), self.ring.prefill_length), np.int32)
        following = np.full(len(sequences), -1, np.int32)
        for row, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
            if sequence:
                prompts[row, :length] = sequence.prompt[:length]
                following[row] = sequence.prompt[length] if length < len(sequence.prompt) else -1
        return prompts, following


def _check(ring: Ring, waiting: Sequence[_Running], keys: Any, **numbers: int) -> np.ndarray | None:
    """Check the arguments; the key data of every prompt."""
    for name, number in numbers.items():
        checked_int(name, number)
    if not waiting:
        raise ValueError("prompts must hold at least one prompt, got none.")
    if keys is None and ring.draws:
        raise ValueError(
            "keys must be a random key a prompt where the sampler draws tokens, got None. Pass "
            "keys=jax.random.split(key, len(prompts))."
        )
    return None if keys is None else data_of_keys(keys, len(waiting))


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


def _first(
    ring: Ring, places: Sequence[_Running | None], key_data: np.ndarray | None
) -> tuple[Any, Any, Any]:
    """Next input, position and key of every place, each [groups, sequences]."""
    shape = (ring.num_groups, ring.group_size)
    positions = np.asarray([sequence.position if sequence else 0 for sequence in places], np.int32)
    tokens = [s.prompt[s.position] if s and s.position < len(s.prompt) else 0 for s in places]
    keys = None
    if key_data is not None:
        rows = np.stack([key_data[sequence.index if sequence else 0] for sequence in places])
        keys = jax.random.wrap_key_data(jnp.asarray(rows.reshape(*shape, *rows.shape[1:])))
    return np.asarray(tokens, np.int32).reshape(shape), positions.reshape(shape), keys


def _forced(ring: Ring, places: Sequence[_Running | None], steps: int) -> np.ndarray:
    """int32[steps, groups, sequences]: prompt tokens to feed, or -1 to sample."""
    nothing = np.full(steps, -1, np.int32)
    rows = np.stack([sequence.forced(steps) if sequence else nothing for sequence in places])
    return np.moveaxis(rows.reshape(ring.num_groups, ring.group_size, steps), -1, 0)


def _replace(ring: Ring, places: list[_Running | None], queue: Iterator[_Running]) -> np.ndarray:
    """Give free places to the next sequences; bool[groups, sequences] of the places that changed
    hands.
    """
    free = np.asarray([sequence is None or sequence.is_done for sequence in places], bool)
    free = free.reshape(ring.num_groups, ring.group_size)
    if not ring.sequences_are_independent:
        free = free & free.all(axis=1)[:, None]  # a group starts and ends together
    taken = np.zeros(free.size, bool)
    for place in np.flatnonzero(free):
        sequence = next(queue, None)
        if sequence is None:
            break
        places[place], taken[place] = sequence, True
    taken = taken.reshape(free.shape)
    return taken if ring.sequences_are_independent else free & taken.any(axis=1)[:, None]
