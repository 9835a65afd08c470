"""Picture of a model's stages under each method: their times, and if they fit."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.partition.rivals import even_by_count
from layerwise_jax.partition import CapacityError, solve

matplotlib.use("Agg")


class LayerFigures(NamedTuple):
    """Name, seconds and bytes of a layer."""

    name: str
    seconds: float
    bytes: float


def draw_stages(
    layers: Sequence[LayerFigures], num_stages: int, capacity: float, path: Path, title: str = ""
) -> Path:
    """Draws the stages of greedy, even-by-count and dp, one column of layers per stage; returns
    `path`.

    A column's height is the stage's seconds, its segments are the layers. The dashed line is the
    bottleneck; a stage that exceeds the capacity is drawn in red, and a method that finds no
    partition says so.
    """
    figure = Figure(figsize=(12, 4), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for panel, (method, boundaries) in zip(
        panels, stagings(layers, num_stages, capacity).items(), strict=True
    ):
        if isinstance(boundaries, str):
            panel.set_title(method)
            panel.text(
                0.5, 0.5, boundaries, transform=panel.transAxes, ha="center", va="center", wrap=True
            )
            continue
        _draw(panel, layers, boundaries, capacity, method)
    panels[0].set_ylabel("seconds a stage")
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def stagings(
    layers: Sequence[LayerFigures], num_stages: int, capacity: float
) -> dict[str, Sequence[int] | str]:
    """Boundaries by method, or the message of a method that finds none."""
    seconds, sizes = [layer.seconds for layer in layers], [layer.bytes for layer in layers]
    found: dict[str, Sequence[int] | str] = {}
    for method in ("greedy", "even by count", "dp"):
        if method == "even by count":
            found[method] = even_by_count(np.asarray(seconds), num_stages)
            continue
        try:
            found[method] = solve(
                seconds, sizes, max_stages=num_stages, capacity=capacity, method=method
            ).boundaries
        except CapacityError as error:
            found[method] = str(error)
    return found


def _draw(
    panel: Axes,
    layers: Sequence[LayerFigures],
    boundaries: Sequence[int],
    capacity: float,
    method: str,
) -> None:
    heights = []
    for stage, (start, stop) in enumerate(itertools.pairwise(boundaries)):
        fits = sum(layer.bytes for layer in layers[start:stop]) <= capacity
        height = 0.0
        for index in range(start, stop):
            shade = ("#4c72b0", "#8fa9d0") if fits else ("#c44e52", "#dd9a9c")
            panel.bar(
                stage, layers[index].seconds, bottom=height, color=shade[index % 2], width=0.85
            )
            height += layers[index].seconds
        heights.append(height)
    panel.axhline(max(heights), linestyle="--", linewidth=1, color="black")
    panel.set_title(f"{method}: {len(heights)} stages, bottleneck {max(heights):.3g} s")
    panel.set_xlabel("stage")
