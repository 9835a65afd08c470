"""Places of a ring: sequences take them, have their prompts read, and leave them when they end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from layerwise_jax import processes
from layerwise_jax.decode.generation.requests import Running
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


class Places:
    """Sequences in the places of a ring.

    Attributes:
      held: the sequence of every place, [groups * sequences]; None where there is none.
      state: the ring state.
      seconds: time spent reading prompts at once.
    """

    def __init__(
        self, ring: Ring, staged: Staged, queue: Iterator[Running], key_data: np.ndarray | None
    ):
        self.ring = ring
        self.staged = staged
        self.queue = queue
        self.key_data = key_data
        self.seconds = 0.0
        self.held: list[Running | None] = [next(queue, None) for _ in range(ring.num_sequences)]
        self.state = ring.start(*self._inputs())
        self._read(np.asarray([sequence is not None for sequence in self.held]))
        self.refill()

    @property
    def shape(self) -> tuple[int, int]:
        """(groups, sequences of a group)."""
        return self.ring.num_groups, self.ring.group_size

    @property
    def is_busy(self) -> bool:
        """True while a sequence has not ended."""
        return any(sequence and not sequence.is_done for sequence in self.held)

    def step(self, steps: int) -> float:
        """Run so many steps, hand out the tokens, and return the seconds."""
        nothing = np.full(steps, -1, np.int32)
        rows = np.stack([x.forced(steps) if x else nothing for x in self.held])
        forced = np.moveaxis(rows.reshape(*self.shape, steps), -1, 0)  # [steps, groups, sequences]
        started = processes.stopwatch()
        self.state, tokens = self.ring(self.staged, self.state, forced)
        seconds = processes.stopwatch() - started
        # [steps, groups, sequences] -> [places, steps]
        by_place = np.moveaxis(tokens, 0, -1).reshape(len(self.held), steps)
        for sequence, new in zip(self.held, by_place, strict=True):
            if sequence:
                sequence.take(new)
        return seconds

    def refill(self) -> None:
        """Replace ended sequences by the next ones."""
        # A sequence may end with the token that reading its prompt gives, so look again.
        while (mask := self._take_free()).any():
            self.state = self.ring.restart(self.state, mask, *self._inputs())
            self._read(mask.reshape(-1))

    def _take_free(self) -> np.ndarray:
        """Give free places to the next sequences; bool[groups, sequences] of the places that
        changed hands.
        """
        free = np.asarray([x is None or x.is_done for x in self.held], bool).reshape(self.shape)
        if not self.ring.sequences_are_independent:
            free = free & free.all(axis=1)[:, None]  # a group starts and ends together
        taken = np.zeros(free.size, bool)
        for place in np.flatnonzero(free):
            sequence = next(self.queue, None)
            if sequence is None:
                break
            self.held[place] = sequence
            taken[place] = True
        taken = taken.reshape(free.shape)
        if self.ring.sequences_are_independent:
            return taken
        # The whole group restarts, places without a sequence included.
        return free & taken.any(axis=1)[:, None]

    def _inputs(self) -> tuple[Any, Any, Any]:
        """Next input, position and key of every place, each [groups, sequences]."""
        positions = np.asarray([x.position if x else 0 for x in self.held], np.int32)
        tokens = [
            x.prompt[x.position] if x and x.position < len(x.prompt) else 0 for x in self.held
        ]
        keys = None
        if self.key_data is not None:
            rows = np.stack([self.key_data[x.index if x else 0] for x in self.held])
            keys = jax.random.wrap_key_data(jnp.asarray(rows.reshape(*self.shape, *rows.shape[1:])))
        return np.asarray(tokens, np.int32).reshape(self.shape), positions.reshape(self.shape), keys

    def _read(self, is_new: np.ndarray) -> None:
        """Read the prompts of groups whose sequences are all new, where the ring can."""
        longest = self.ring.prefill_length
        pairs = list(zip(self.held, is_new, strict=True))
        is_old = [x is not None and not x.is_done and not new for x, new in pairs]
        # [groups], and lengths [groups, sequences]
        reads = is_new.reshape(self.shape).any(axis=1)
        reads &= ~np.asarray(is_old).reshape(self.shape).any(axis=1)
        of_new = [x if new else None for x, new in pairs]
        lengths = np.asarray([min(len(x.prompt), longest) if x else longest for x in of_new])
        lengths = lengths.reshape(self.shape)
        if not self.ring.sequences_are_independent:
            reads &= (lengths == longest).all(axis=1)
        if not longest or not reads.any():
            return
        lengths = np.where(reads[:, None], lengths, 0)
        prompts, following = self._prompts(of_new, lengths.reshape(-1))
        self.ring.compiled_prefill(self.staged, self.state)  # compiling is not in the time
        started = processes.stopwatch()
        prompts = prompts.reshape(*self.shape, -1)
        following = following.reshape(self.shape)
        self.state, tokens = self.ring.prefill(self.staged, self.state, prompts, lengths, following)
        self.seconds += processes.stopwatch() - started
        read = zip(of_new, tokens.reshape(-1), lengths.reshape(-1), strict=True)
        for sequence, token, length in read:
            if sequence and length:
                sequence.position = int(length) - 1
                sequence.take(token[None])

    def _prompts(
        self, sequences: Sequence[Running | None], lengths: np.ndarray
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
