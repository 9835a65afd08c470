"""Memory levels of a device, from shared memory to device memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Names of the levels that devices have, fastest first.
LEVELS = ("shared", "l2", "memory")
FIGURES = ("bytes", "usable_bytes", "bandwidth")


@dataclass(frozen=True)
class MemoryLevel:
    """One level of a device's memory.

    Attributes:
      name: "shared" (on-chip memory of all multiprocessors together), "l2" (last-level cache) or
        "memory" (device memory).
      bytes: capacity, as the device reports it.
      usable_bytes: the largest working set that is still read at this level's bandwidth.
      bandwidth: bytes a second, for a working set within `usable_bytes`.

    Raises:
      ValueError: an unknown name, or a figure that is not positive and finite, or more usable bytes
        than bytes.
    """

    name: str
    bytes: int
    usable_bytes: int
    bandwidth: float

    def __post_init__(self) -> None:
        if self.name not in LEVELS:
            raise ValueError(f"name must be one of {', '.join(LEVELS)}, got {self.name!r}.")
        for figure, kind in (("bytes", int), ("usable_bytes", int), ("bandwidth", (int, float))):
            value = getattr(self, figure)
            name = figure_name(self.name, figure)
            if isinstance(value, bool) or not isinstance(value, kind):
                expected = "int" if kind is int else "float"
                raise ValueError(f"{name} must be of type {expected}, got {value!r}.")
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}.")
        if self.usable_bytes > self.bytes:
            raise ValueError(
                f"usable_{self.name}_bytes must be at most {self.name}_bytes, {self.bytes}, got "
                f"{self.usable_bytes}."
            )


def figure_name(level: str, figure: str) -> str:
    """Flat name of a level's figure: `l2_bytes`, `usable_l2_bytes`, `l2_bandwidth`."""
    return f"usable_{level}_bytes" if figure == "usable_bytes" else f"{level}_{figure}"


def levels_of(figures: Mapping[str, Any]) -> tuple[MemoryLevel, ...]:
    """The levels among flat figures such as `l2_bytes` and `memory_bandwidth`, fastest first.

    Device memory, and any other level without `usable_<level>_bytes`, is usable as a whole. A level
    without `<level>_bytes` does not exist.
    """
    return tuple(
        MemoryLevel(
            name,
            figures[f"{name}_bytes"],
            figures.get(f"usable_{name}_bytes", figures[f"{name}_bytes"]),
            figures[f"{name}_bandwidth"],
        )
        for name in LEVELS
        if f"{name}_bytes" in figures
    )


def figures_of(levels: tuple[MemoryLevel, ...]) -> dict[str, Any]:
    """The inverse of `levels_of`, without usable bytes of levels that are usable as a whole."""
    return {
        figure_name(level.name, figure): getattr(level, figure)
        for level in levels
        for figure in FIGURES
        if figure != "usable_bytes" or level.usable_bytes != level.bytes
    }
