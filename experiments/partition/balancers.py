"""The partitioner against other balancers: quality, time, growth."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from experiments.grid import Grid
from experiments.partition.rivals import (
    Times,
    block_partition,
    bottleneck_of,
    even_by_count,
    least_spread,
)
from layerwise_jax.partition import solve

RIVALS: dict[str, Callable[[Times, int], list[int]]] = {
    "even by count": even_by_count,
    "block partition (torchgpipe)": block_partition,
    "least spread (DeepSpeed)": least_spread,
}


def cases() -> dict[str, tuple[Times, int]]:
    """Times of layers and a number of stages, by name of the case."""
    draw = np.random.default_rng(0)
    decoder = np.concatenate([[3.0], np.tile([1.0, 2.0], 48), [14.0]])
    return {
        "equal layers, 63 over 32": (np.ones(63), 32),
        "decoder of 98 layers with a dear head, 98 over 16": (decoder, 16),
        "uniform, 64 over 8": (draw.random(64), 8),
        "uniform, 256 over 32": (draw.random(256), 32),
        "uniform, 1,000 over 64": (draw.random(1000), 64),
        "log-normal, 256 over 32": (draw.lognormal(0, 1, 256), 32),
        "log-normal, 1,000 over 64": (draw.lognormal(0, 1, 1000), 64),
        "a ramp, 200 over 24": (np.linspace(1, 10, 200), 24),
    }


def compare() -> list[dict[str, Any]]:
    """Per case, each rival's bottleneck over the optimum and its time over that of `solve`."""
    rows = []
    for name, (times, stages) in cases().items():
        optimum, seconds = timed(
            lambda times=times, stages=stages: solve(times, None, max_stages=stages), 3
        )
        row: dict[str, Any] = {
            "case": name,
            "optimum": optimum.bottleneck,
            "milliseconds": 1e3 * seconds,
        }
        for rival, balance in RIVALS.items():
            boundaries, rival_seconds = timed(
                lambda times=times, stages=stages, f=balance: f(times, stages), 1
            )
            row[rival] = {
                "quality": bottleneck_of(times, boundaries) / optimum.bottleneck,
                "time": rival_seconds / seconds,
            }
        rows.append(row)
    return rows


def worst_of_many(trials: int = 1000) -> dict[str, float]:
    """Largest bottleneck over the optimum on small random sequences, by rival."""
    draw = np.random.default_rng(1)
    worst = dict.fromkeys(RIVALS, 1.0)
    for _ in range(trials):
        layers = int(draw.integers(4, 40))
        stages = int(draw.integers(2, layers + 1))
        times = draw.integers(1, 20, size=layers).astype(float)
        optimum = solve(times, None, max_stages=stages).bottleneck
        for rival, balance in RIVALS.items():
            worst[rival] = max(worst[rival], bottleneck_of(times, balance(times, stages)) / optimum)
    return worst


def growth() -> list[dict[str, Any]]:
    """Milliseconds of `solve` by numbers of layers and stages, and by kind of problem."""
    sizes = [
        (1000, 10),
        (1000, 64),
        (1000, 100),
        (10000, 100),
        (10000, 1000),
        (100000, 1000),
        (100000, 10000),
    ]
    rows = []
    for layers, stages in sizes:
        row: dict[str, Any] = {"layers": layers, "stages": stages}
        for structure, keywords in structures(layers, stages).items():
            _, seconds = timed(lambda keywords=keywords: solve(**keywords), 2)
            row[structure] = 1e3 * seconds
        rows.append(row)
    return rows


def structures(layers: int, stages: int) -> dict[str, dict[str, Any]]:
    """Keywords of `solve` for each kind of problem at one size."""
    draw = np.random.default_rng(2)
    plain = {
        "seconds": draw.random(layers),
        "weight_bytes": draw.integers(1, 9, layers),
        "max_stages": stages,
    }
    capped = plain | {
        "transient_bytes": draw.integers(1, 9, layers),
        "capacity": 6 * layers / stages + 16,
    }
    cuts = {"cut_seconds": np.concatenate([[0], draw.random(layers - 1), [0]])}
    shapes = {"balance only": plain, "capacity": capped, "cut costs": plain | cuts}
    if layers * stages <= 10**6:
        shapes["capacity and cut costs"] = capped | cuts
    return shapes


def timed(action: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """Value of an action, and the least processor seconds of its runs."""
    least, value = float("inf"), None
    for _ in range(repeats):
        start = time.process_time()
        value = action()
        least = min(least, time.process_time() - start)
    return value, least


def grids(figures: dict[str, Any]) -> tuple[Grid, Grid]:
    """Quality and time of every balancer by case; time of `solve` by size."""
    rows = []
    for row in figures["compare"]:
        cells = [
            f"{row[rival]['quality']:.2f}x, {_short(row[rival]['time'])}x the time"
            for rival in RIVALS
        ]
        rows.append([row["case"], f"{row['optimum']:.4g}", f"{row['milliseconds']:.1f}", *cells])
    worst = [f"{figures['worst'][rival]:.2f}x" for rival in RIVALS]
    rows.append(["worst of 1,000 small ones", "", "", *worst])
    quality = Grid("", ["case", "optimum", "`solve`, ms", *RIVALS], rows)
    names = [name for name in figures["growth"][0] if name not in ("layers", "stages")]
    sizes = [
        [
            f"{row['layers']:,}",
            f"{row['stages']:,}",
            *(f"{row[name]:,.0f}" if name in row else "" for name in names),
        ]
        for row in figures["growth"]
    ]
    time_by_size = Grid("", ["layers", "stages", *(f"{name}, ms" for name in names)], sizes)
    return quality, time_by_size


def _short(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2g}"


def measure(folder: Path, console: Console) -> None:
    """Measure all cases, write figures and tables to `folder`, print the tables."""
    figures = {"compare": compare(), "worst": worst_of_many(), "growth": growth()}
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    tables = "\n\n".join(grid.markdown() for grid in grids(figures))
    (folder / "tables.md").write_text(tables + "\n", encoding="utf-8")
    for grid in grids(figures):
        grid.show(console)
