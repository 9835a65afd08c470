"""Stacked bars as values: what HTML and matplotlib draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

# Colours of segments in order; their greys differ too.
PALETTE = ("#3182bd", "#9ecae1", "#fdae6b", "#a1d99b", "#bcbddc")


@dataclass(frozen=True)
class Segment:
    """One part of a bar: its name and its size."""

    name: str
    value: float


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
      label: text before the bar.
      segments: its parts, from the left; bars of one chart name theirs in the same order.
      details: text on hover, after the parts.
    """

    label: str
    segments: tuple[Segment, ...]
    details: str = ""

    @property
    def total(self) -> float:
        return sum(segment.value for segment in self.segments)


@dataclass(frozen=True)
class Bars:
    """A chart of stacked bars.

    Attributes:
      bars: the bars, from the top.
      text: value -> text with a unit.
      limit: value of a line that no bar should cross; None for no line.
      limit_name: name of the line.
    """

    bars: Sequence[Bar]
    text: Callable[[float], str]
    limit: float | None = None
    limit_name: str = "capacity"

    @property
    def largest(self) -> float:
        """The value at the right end of the chart: of the longest bar or the limit."""
        longest = max((bar.total for bar in self.bars), default=0.0)
        return max(longest, self.limit or 0.0) or 1.0

    @property
    def names(self) -> list[str]:
        """Names of the segments, each once, in order."""
        return list(dict.fromkeys(each.name for bar in self.bars for each in bar.segments))

    def colour(self, name: str) -> str:
        return PALETTE[self.names.index(name) % len(PALETTE)]

    def hover(self, bar: Bar) -> str:
        """Text on hover: the parts with their sizes, then the bar's details."""
        parts = [f"{each.name} {self.text(each.value)}" for each in bar.segments]
        return "; ".join([f"{bar.label}: {self.text(bar.total)}", *parts, bar.details]).rstrip("; ")
