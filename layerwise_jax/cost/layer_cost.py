"""Cost of a layer in plain numbers, and sums of costs."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class LayerCost:
    """Cost of a layer, or of several, for one microbatch.

    Attributes:
      name: name of the layer.
      weight_bytes: bytes of its parameters.
      activation_bytes: bytes of its output (feature map x examples of a microbatch).
      buffer_bytes: bytes of workspace that the compiler allocates inside the layer.
      flops: floating-point operations.
      bytes_accessed: bytes that its operations read and write.
      peak_bytes: the most bytes alive at once while it runs; 0 if unknown.
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
                    f"{field.name} of layer '{self.name}' must be finite and at least 0, got "
                    f"{value}."
                )

    @property
    def size(self) -> int:
        """Bytes of weights, activations and buffers together, which the paper calls its size."""
        return self.weight_bytes + self.activation_bytes + self.buffer_bytes

    def __add__(self, other: LayerCost) -> LayerCost:
        """The cost of both layers in sequence: sizes and work add, the peak is the larger one."""
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
        """The cost of running the layer `repeats` times: work multiplies, sizes stay."""
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
    """The sum of one cost or more.

    Raises:
      ValueError: `costs` is empty.
    """
    costs = tuple(costs)
    if not costs:
        raise ValueError("costs must have at least one LayerCost, got none.")
    return functools.reduce(operator.add, costs)
