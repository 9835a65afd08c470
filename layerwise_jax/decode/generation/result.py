"""Results of generation: all tokens with times, or the new tokens of one call."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Chunk:
    """New tokens of one prompt, as `DecodeRing.stream` yields them.

    Attributes:
      index: of the prompt.
      tokens: int32[new tokens since the chunk before].
      is_last: whether the sequence has ended.
    """

    index: int
    tokens: np.ndarray
    is_last: bool


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
        # Compilation is in neither time.
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
