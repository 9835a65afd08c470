"""matplotlib figures of charts and timelines. matplotlib is imported when one is drawn."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from layerwise_jax.render.bars import Bars
from layerwise_jax.render.timeline import Timeline

# matplotlib's stubs leave **kwargs untyped.
# pyright: reportUnknownMemberType=false

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE_WIDTH = 80  # characters


def plot_bars(chart: Bars, title: str = "") -> Figure:
    """A figure of stacked horizontal bars with the limit as a line.

    Raises:
      ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.5 + 0.3 * len(chart.bars)), layout="constrained")
    axes = figure.subplots()
    rows = list(range(len(chart.bars)))
    left = [0.0] * len(rows)
    for name in chart.names:
        values = [
            sum(each.value for each in bar.segments if each.name == name) for bar in chart.bars
        ]
        axes.barh(rows, values, left=left, color=chart.colour(name), label=name)
        left = [start + value for start, value in zip(left, values, strict=True)]
    if chart.limit is not None:
        label = f"{chart.limit_name} {chart.text(chart.limit)}"
        axes.axvline(chart.limit, color="#d62728", linestyle="--", label=label)
    axes.set_yticks(rows, [bar.label for bar in chart.bars])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.xaxis.set_major_formatter(lambda value, _: chart.text(value))
    _add_title(figure, title)
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    return figure


def plot_timeline(timeline: Timeline) -> Figure:
    """A figure of spans on rows.

    Raises:
      ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(8, 1.5 + 0.4 * len(timeline.rows)), layout="constrained")
    axes = figure.subplots()
    for span in timeline.spans:
        axes.barh(
            span.row,
            span.end - span.start,
            left=span.start,
            height=0.9,
            color=timeline.colours[span.kind],
            edgecolor="white",
            linewidth=0.5,
        )
    axes.set_yticks(list(range(len(timeline.rows))), list(timeline.rows))
    axes.set_ylim(len(timeline.rows) - 0.5, -0.5)
    axes.set_xlim(0, timeline.end)
    axes.set_xlabel(timeline.axis)
    _add_title(figure, timeline.title)
    handles = [
        Patch(color=timeline.colours[kind], label=timeline.names[kind]) for kind in timeline.kinds
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _add_title(figure: Figure, title: str) -> None:
    """A title over the figure, wrapped to its width."""
    figure.suptitle("\n".join(textwrap.wrap(title, TITLE_WIDTH)), fontsize=9)
