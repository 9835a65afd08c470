"""A timeline as values: spans of time on rows, what HTML and matplotlib draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from layerwise_jax._tables import seconds_text


@dataclass(frozen=True)
class Span:
    """One span: its row, text and kind, and its start and end."""

    row: int
    text: str
    kind: str
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """Spans on rows.

    Attributes:
      rows: names of the rows, from the top.
      spans: the spans, in any order.
      colours: kind -> colour.
      names: kind -> name in the legend and on hover.
      title: one line above.
      text: time -> text with a unit.
      axis: name of the time axis.
    """

    rows: Sequence[str]
    spans: Sequence[Span]
    colours: Mapping[str, str]
    names: Mapping[str, str]
    title: str = ""
    text: Callable[[float], str] = seconds_text
    axis: str = "seconds"

    @property
    def end(self) -> float:
        """The latest end; 1 if nothing takes time."""
        return max((span.end for span in self.spans), default=0.0) or 1.0

    @property
    def kinds(self) -> list[str]:
        """Kinds that occur, in the order of `colours`."""
        found = {span.kind for span in self.spans}
        return [kind for kind in self.colours if kind in found]
