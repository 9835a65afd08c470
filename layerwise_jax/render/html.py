"""HTML of charts, tables and whole pages: self-contained, without scripts, all text escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from layerwise_jax.render.bars import Bar, Bars
from layerwise_jax.render.timeline import Span, Timeline

LABEL_WIDTH = 150
CHART_WIDTH = 560
ROW_HEIGHT = 22
STYLE = "font-family:system-ui,sans-serif;font-size:13px;color:#222;background:#fff;max-width:760px"


def page(title: str, sections: Iterable[tuple[str, str]]) -> str:
    """A whole document.

    Args:
      title: title and heading.
      sections: (heading, HTML) of each section.
    """
    body = "".join(f"<h2>{escape(heading)}</h2>\n{html}\n" for heading, html in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title></head>\n"
        f'<body style="{STYLE};margin:2em auto"><h1>{escape(title)}</h1>\n{body}</body></html>\n'
    )


def text_html(paragraphs: Iterable[str]) -> str:
    """Paragraphs of plain text."""
    lines = "".join(f"<p style='margin:4px 0'>{escape(text)}</p>" for text in paragraphs if text)
    return f'<div style="{STYLE}">{lines}</div>'


def table_html(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of text; all columns but the first are right-aligned."""
    cells = "padding:2px 8px;border-bottom:1px solid #ddd"
    names = "".join(f'<th style="{cells};text-align:left">{escape(name)}</th>' for name in head)
    lines = "".join(
        "<tr>"
        + "".join(
            f'<td style="{cells};text-align:{"right" if j else "left"}">{escape(cell)}</td>'
            for j, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return (
        f'<table style="{STYLE};border-collapse:collapse"><thead><tr>{names}</tr></thead>'
        f"<tbody>{lines}</tbody></table>"
    )


def bars_html(chart: Bars) -> str:
    """A chart of horizontal bars as SVG; hovering a bar shows its parts and details."""
    height = ROW_HEIGHT * len(chart.bars)
    scale = CHART_WIDTH / chart.largest
    drawn = "".join(_bar(chart, bar, ROW_HEIGHT * row, scale) for row, bar in enumerate(chart.bars))
    line = ""
    if chart.limit is not None:
        x = LABEL_WIDTH + chart.limit * scale
        name = f"{chart.limit_name} {chart.text(chart.limit)}"
        line = (
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}" stroke="#d62728" '
            f'stroke-dasharray="4 3"><title>{escape(name)}</title></line>'
        )
    legend = [(chart.colour(name), name) for name in chart.names]
    if chart.limit is not None:
        legend.append(("#d62728", f"{chart.limit_name}: {chart.text(chart.limit)}"))
    return _figure(height, drawn + line, legend)


def _bar(chart: Bars, bar: Bar, top: float, scale: float) -> str:
    """One bar with its label before and its total after it."""
    left = float(LABEL_WIDTH)
    parts: list[str] = []
    for segment in bar.segments:
        width = segment.value * scale
        parts.append(
            f'<rect x="{left:.1f}" y="{top + 3:.1f}" width="{width:.1f}" height="{ROW_HEIGHT - 6}" '
            f'fill="{chart.colour(segment.name)}"></rect>'
        )
        left += width
    middle = top + ROW_HEIGHT / 2 + 4
    return (
        f"<g><title>{escape(chart.hover(bar))}</title>"
        f'<text x="{LABEL_WIDTH - 6}" y="{middle:.1f}" text-anchor="end">'
        f"{escape(_shortened(bar.label))}</text>{''.join(parts)}"
        f'<text x="{left + 4:.1f}" y="{middle:.1f}">{escape(chart.text(bar.total))}</text></g>'
    )


def timeline_html(timeline: Timeline) -> str:
    """Spans on rows as SVG; hovering a span shows its kind and its time."""
    height = ROW_HEIGHT * len(timeline.rows)
    scale = CHART_WIDTH / timeline.end
    labels = "".join(
        f'<text x="{LABEL_WIDTH - 6}" y="{ROW_HEIGHT * (row + 0.5) + 4:.1f}" text-anchor="end">'
        f"{escape(_shortened(name))}</text>"
        for row, name in enumerate(timeline.rows)
    )
    spans = "".join(_span(timeline, span, scale) for span in timeline.spans)
    legend = [(timeline.colours[kind], timeline.names[kind]) for kind in timeline.kinds]
    title = text_html([timeline.title]) if timeline.title else ""
    return title + _figure(height, labels + spans, legend)


def _span(timeline: Timeline, span: Span, scale: float) -> str:
    time = f"{timeline.text(span.start)} to {timeline.text(span.end)}"
    hover = f"{span.text}, {timeline.names[span.kind]}: {time}"
    return (
        f'<rect x="{LABEL_WIDTH + span.start * scale:.2f}" y="{ROW_HEIGHT * span.row + 2}" '
        f'width="{max((span.end - span.start) * scale, 0):.2f}" height="{ROW_HEIGHT - 4}" '
        f'fill="{timeline.colours[span.kind]}" stroke="#fff" stroke-width="0.5">'
        f"<title>{escape(hover)}</title></rect>"
    )


def _figure(height: float, drawn: str, legend: Iterable[tuple[str, str]]) -> str:
    """An SVG of fixed width with a legend of coloured squares below."""
    width = LABEL_WIDTH + CHART_WIDTH + 90  # space for totals after the longest bar
    squares = "".join(
        f'<span style="margin-right:14px"><span style="display:inline-block;width:10px;height:10px;'
        f'background:{colour}"></span> {escape(name)}</span>'
        for colour, name in legend
    )
    return (
        f'<div style="{STYLE};max-width:{width}px"><svg xmlns="http://www.w3.org/2000/svg" '
        f'width="100%" viewBox="0 0 {width} {max(height, 1)}" font-size="12" '
        f'font-family="system-ui,sans-serif">{drawn}</svg><div>{squares}</div></div>'
    )


def _shortened(label: str, most: int = 22) -> str:
    return label if len(label) <= most else f"{label[: most - 1]}…"
