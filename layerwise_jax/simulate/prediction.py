"""What is predicted for a step under one strategy."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from layerwise_jax.simulate.stage import Parts
from layerwise_jax.simulate.strategy import Strategy
from layerwise_jax.simulate.work import StepWork


@dataclass(frozen=True)
class Prediction:
    """What one step takes under one strategy. Bytes on a device are the fullest device's.

    Attributes:
      work: what is to be done.
      strategy: how it is spread.
      device: the device's name.
      step_seconds: from one step to the next: in decoding one token for every sequence.
      seconds_by_part: the step by what its slowest stage spends it on; idle ticks count as what
        they wait for.
      lower_bound_seconds: weights and caches read as often as this strategy reads them, or
        arithmetic if that takes longer, and nothing else.
      num_ticks: turns of the loop in a step, in each direction.
      weight_bytes: on a device; in training with the gradients' accumulators.
      state_bytes: on a device, caches of all its groups.
      activation_bytes: on a device.
      memory_bytes: what a device can hold.
      link_bytes: sent over all links together in a step.
      collectives: in a step, on a device.
      is_resident: whether all stages read their weights from the cache.
    """

    work: StepWork
    strategy: Strategy
    device: str
    step_seconds: float
    seconds_by_part: Parts
    lower_bound_seconds: float
    num_ticks: int
    weight_bytes: float
    state_bytes: float
    activation_bytes: float
    memory_bytes: float
    link_bytes: float
    collectives: int
    is_resident: bool

    @property
    def examples_per_second(self) -> float:
        return self.work.batch / self.step_seconds

    @property
    def tokens_per_second(self) -> float:
        return self.examples_per_second * self.work.tokens

    @property
    def lower_bound_per_second(self) -> float:
        """Tokens a second that no program of this shape exceeds; in decoding, what memory traffic
        alone allows.

        In training, none that recomputes as the strategy does.
        """
        return self.work.batch * self.work.tokens / self.lower_bound_seconds

    @property
    def inter_token_latency(self) -> float:
        """Seconds between two tokens of one sequence; where nothing is decoded, from the batch to
        its results.
        """
        return self.step_seconds

    @property
    def seconds_per_token(self) -> float:
        """1 / tokens a second, which is no latency."""
        return 1 / self.tokens_per_second

    @property
    def num_groups(self) -> int:
        """Groups of a replica."""
        return self.strategy.num_groups(self.work.batch)

    @property
    def bubble_share(self) -> float:
        """The share of its ticks in which a stage has no group."""
        return 1 - self.num_groups / self.num_ticks

    @property
    def bytes_per_device(self) -> float:
        return self.weight_bytes + self.state_bytes + self.activation_bytes

    @property
    def fits_memory(self) -> bool:
        return self.bytes_per_device <= self.memory_bytes

    @property
    def bound_by(self) -> str:
        """What most of the step is spent on: "memory", "cache", "arithmetic", "links" or
        "latency".
        """
        return self.seconds_by_part.largest

    def to_dict(self) -> dict[str, Any]:
        """The figures, without the work, as JSON takes them."""
        names = (
            "step_seconds",
            "tokens_per_second",
            "examples_per_second",
            "inter_token_latency",
            "seconds_per_token",
        )
        names += (
            "lower_bound_seconds",
            "lower_bound_per_second",
            "num_ticks",
            "bubble_share",
            "bound_by",
        )
        names += (
            "weight_bytes",
            "state_bytes",
            "activation_bytes",
            "bytes_per_device",
            "fits_memory",
            "link_bytes",
            "collectives",
        )
        figures = {name: getattr(self, name) for name in (*names, "is_resident")}
        return {
            "strategy": self.strategy.name,
            "mesh": self.strategy.mesh,
            "groups": self.num_groups,
            **figures,
            "seconds_by_part": asdict(self.seconds_by_part),
        }
