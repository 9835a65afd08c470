"""Prediction of one step under one strategy."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from layerwise_jax.simulate.stage import Parts
from layerwise_jax.simulate.strategy import Strategy
from layerwise_jax.simulate.work import StepWork


@dataclass(frozen=True)
class Prediction:
    """Predicted time and memory of one step. Bytes of a device are those of the fullest one.

    Attributes:
      work: the step.
      strategy: its mesh and groups.
      device: name of the device.
      step_seconds: seconds from one step to the next; in decoding, one token of every sequence.
      seconds_by_part: seconds of the slowest stage by bottleneck; idle ticks count as the part that
        they wait for.
      lower_bound_seconds: the longer of arithmetic and of the strategy's reads of weights and
        caches, without any overhead.
      num_ticks: iterations of the loop in a step, in each direction.
      weight_bytes: bytes of weights on a device; in training with gradient accumulators.
      state_bytes: bytes of the caches of all groups on a device.
      activation_bytes: bytes of activations on a device.
      memory_bytes: memory of a device.
      link_bytes: bytes sent over all links together in a step.
      collectives: collectives of a device in a step.
      is_resident: True if all stages read their weights from the cache.
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
        """Upper bound on the tokens a second of the strategy, from `lower_bound_seconds`.

        In training it includes the recomputation of the forward pass.
        """
        return self.work.batch * self.work.tokens / self.lower_bound_seconds

    @property
    def inter_token_latency(self) -> float:
        """Seconds between two tokens of one sequence; for other work, seconds of a step."""
        return self.step_seconds

    @property
    def seconds_per_token(self) -> float:
        """1 / tokens a second, a throughput rather than a latency."""
        return 1 / self.tokens_per_second

    @property
    def num_groups(self) -> int:
        """Groups of a replica."""
        return self.strategy.num_groups(self.work.batch)

    @property
    def bubble_share(self) -> float:
        """Share of the ticks in which a stage has no group."""
        return 1 - self.num_groups / self.num_ticks

    @property
    def bytes_per_device(self) -> float:
        return self.weight_bytes + self.state_bytes + self.activation_bytes

    @property
    def fits_memory(self) -> bool:
        return self.bytes_per_device <= self.memory_bytes

    @property
    def bound_by(self) -> str:
        """The largest part of the step: "memory", "cache", "arithmetic", "links" or "latency"."""
        return self.seconds_by_part.largest

    def to_dict(self) -> dict[str, Any]:
        """The figures without the work, ready for JSON."""
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
