"""Generation for any number of prompts: sequences take places in the ring and leave them when they
end (continuous batching).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rich.progress import Progress

from layerwise_jax._arguments import checked_int
from layerwise_jax.decode.generation.places import Places, Ring
from layerwise_jax.decode.generation.requests import checked_keys, checked_requests
from layerwise_jax.decode.generation.result import Chunk, Generation
from layerwise_jax.stage.placement import Staged


class GenerationRun:
    """One call's generation: iterating runs it and gives the new tokens as they appear.

    A sequence that ends gives its place to the next prompt. Where a group shares a part of its
    cache (a counter), all of the group end before new sequences start. Prompts are read one token a
    step, unless the ring has a `prefill_fn`: it reads the prompts of a group at once if all its
    sequences are new, up to `prefill_length` tokens. Where the group shares a part of its cache,
    all prompts must be at least that long.

    Args:
      ring: the ring.
      staged: its placed parameters.
      prompts: int[length] or `Request` each, any lengths and number.
      max_new_tokens: most new tokens of a sequence.
      keys: a random key a prompt; None for a greedy sampler, or where requests have keys.
      stop_sequences: token sequences, each of which ends a sequence whose new tokens end with it.
      steps_per_call: steps of a program call, between which ended sequences are replaced.

    Raises:
      ValueError: no prompt, an empty one or one that is no token ids, a limit below 1, an empty
        stop sequence, or keys that are missing or do not match the prompts.
    """

    def __init__(
        self,
        ring: Ring,
        staged: Staged,
        prompts: Sequence[Any],
        max_new_tokens: int,
        *,
        keys: Any = None,
        stop_sequences: Sequence[Sequence[int]] = (),
        steps_per_call: int = 64,
    ):
        self._ring = ring
        self._staged = staged
        # Prompts may come from a generator, and are read twice.
        prompts = list(prompts)
        self._requests = checked_requests(prompts, max_new_tokens, stop_sequences, ring.stop_tokens)
        self._steps_per_call = checked_int("steps_per_call", steps_per_call)
        self._key_data = checked_keys(prompts, keys, ring.draws)
        self._steps = 0
        self._seconds = 0.0
        self._prefill_seconds = 0.0

    @property
    def num_tokens(self) -> int:
        """New tokens so far."""
        return sum(len(request.new) for request in self._requests)

    @property
    def limit(self) -> int:
        """New tokens if nothing stops a sequence earlier."""
        return sum(request.limit for request in self._requests)

    def __iter__(self) -> Iterator[Chunk]:
        places = Places(self._ring, self._staged, iter(self._requests), self._key_data)
        self._prefill_seconds = places.seconds
        # A shorter program where no sequence needs as many steps.
        longest = max(request.remaining for request in self._requests)
        steps = max(1, min(self._steps_per_call, longest))
        self._ring.compiled(self._staged, places.state, steps)  # compiling is not in the time
        while True:
            # Before the first step there are tokens already if prompts were read at once.
            yield from self._chunks()
            if not places.is_busy:
                break
            self._seconds += places.step(steps)
            self._steps += steps
            places.refill()
            self._prefill_seconds = places.seconds

    def _chunks(self) -> Iterator[Chunk]:
        """The tokens that are new since the last look."""
        for request in self._requests:
            tokens = request.new[request.num_reported :]
            if tokens:
                request.num_reported += len(tokens)
                yield Chunk(request.index, np.asarray(tokens, np.int32), request.is_done)

    def result(self) -> Generation:
        """All tokens so far, and the times."""
        tokens = tuple(np.asarray(request.new, np.int32) for request in self._requests)
        return Generation(tokens, self._steps, self._seconds, self._prefill_seconds)


def generate(run: GenerationRun, progress: bool = False) -> Generation:
    """Run a generation to its end.

    Args:
      run: the generation.
      progress: whether to show a progress bar.
    """
    with Progress(disable=not progress) as bar:
        task = bar.add_task("tokens", total=run.limit)
        for _ in run:
            bar.update(task, completed=run.num_tokens)
    return run.result()
