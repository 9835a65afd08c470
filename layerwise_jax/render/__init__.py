"""Rendering of plain numbers: HTML for notebooks and reports, matplotlib. Imports no JAX."""

from layerwise_jax.render.bars import Bar, Bars, Segment
from layerwise_jax.render.html import bars_html, page, table_html, text_html, timeline_html
from layerwise_jax.render.plots import plot_bars, plot_timeline
from layerwise_jax.render.timeline import Span, Timeline

__all__ = [
    "Bar",
    "Bars",
    "Segment",
    "Span",
    "Timeline",
    "bars_html",
    "page",
    "table_html",
    "text_html",
    "timeline_html",
    "plot_bars",
    "plot_timeline",
]
