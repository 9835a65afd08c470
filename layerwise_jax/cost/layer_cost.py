"""What a layer costs, in plain numbers, and how costs add."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class LayerCost:
    """The cost of a layer, or of several.

    Attributes:
      name: the layer.
      weight_bytes: bytes of its parameters.
      activation_bytes: bytes of what it passes on, for one microbatch (output feature map x batch).
      buffer_bytes: bytes of workspace that the compiler allocates inside it.
      flops: floating-point operations of one microbatch.
      bytes_accessed: bytes that its operations read and write.
      peak_bytes: the most bytes alive at once while it runs; 0 where that is not known.
    """

    name: str
    weight_bytes: int
    activation_bytes: int
    buffer_bytes: int
    flops: float = 0.0
    bytes_accessed: float = 0.0
    peak_bytes: int = 0

    def __post_init__(self) -> None:
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if not 0 <= value < math.inf:
                raise ValueError(
                    f"{field.name} of layer '{self.name}' is {value}; a number of at least 0 is "
                    "wanted."
                )

    @property
    def size(self) -> int:
        """Weights, activations and buffers together: what the paper calls the size of a layer."""
        return self.weight_bytes + self.activation_bytes + self.buffer_bytes

    def __add__(self, other: LayerCost) -> LayerCost:
        """One after the other: sizes and work add, the peak is the larger."""
        return LayerCost(
            f"{self.name} + {other.name}",
            self.weight_bytes + other.weight_bytes,
            self.activation_bytes + other.activation_bytes,
            self.buffer_bytes + other.buffer_bytes,
            self.flops + other.flops,
            self.bytes_accessed + other.bytes_accessed,
            max(self.peak_bytes, other.peak_bytes),
        )

    def __mul__(self, repeats: int) -> LayerCost:
        """The layer run `repeats` times over: its work repeats, what it holds does not."""
        return LayerCost(
            f"{self.name} x {repeats}",
            self.weight_bytes,
            self.activation_bytes,
            self.buffer_bytes,
            self.flops * repeats,
            self.bytes_accessed * repeats,
            self.peak_bytes,
        )


def total(costs: Iterable[LayerCost]) -> LayerCost:
    """The sum of at least one cost.

    Raises:
      ValueError: there is none.
    """
    costs = tuple(costs)
    if not costs:
        raise ValueError("The total of no costs has no name; at least one LayerCost is wanted.")
    return functools.reduce(operator.add, costs)
