"""Pictures of the planned experiment: strategies and bounds, the ring in time, memory and cache."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from experiments.dense16.paper import BASELINE, CLAIMS
from experiments.dense16.predictions import Setup, cache_verdict, rows_to_show, shape_text
from layerwise_jax.cost import WIDTHS, DeviceSpec
from layerwise_jax.simulate import Prediction, Strategy

matplotlib.use("Agg")  # no screen is needed, and none may be there

MIB = 2**20
DOTS_PER_INCH = 120
RED, BLUE, GREY = "#de2d26", "#3182bd", "#bdbdbd"
GROUP_COLOURS = (
    "#9ecae1",
    "#fdbb84",
    "#a1d99b",
    "#bcbddc",
    "#fa9fb5",
    "#d9d9d9",
    "#ffeda0",
    "#c7e9c0",
)


def draw_paper(setup: Setup, devices: Sequence[DeviceSpec], path: Path) -> None:
    """One panel per device, one bar per strategy: predicted tokens/s, memory bound, the paper's
    figures.
    """
    figure = Figure(figsize=(12, 4), layout="constrained")
    panels = figure.subplots(1, len(devices), sharex=True, squeeze=False)[0]
    for axes, device in zip(panels, devices, strict=True):
        rows = [row for row in rows_to_show(setup, device) if row.fits_memory][::-1]
        names = [f"{row.strategy.name}\n{shape_text(row.strategy)}" for row in rows]
        colours = [RED if row.strategy.name.startswith("layer-wise") else BLUE for row in rows]
        axes.barh(names, [row.tokens_per_second for row in rows], color=colours, label="predicted")
        axes.plot(
            [row.lower_bound_per_second for row in rows],
            range(len(rows)),
            "k|",
            ms=18,
            label="bound: memory traffic",
        )
        claimed = [(j, row) for j, row in enumerate(rows) if _is_claimed(row.strategy, setup)]
        values = [CLAIMS[row.strategy.name].tokens_per_second for _, row in claimed]
        axes.plot(
            values, [j for j, _ in claimed], "D", color="black", mfc="white", label="the paper"
        )
        axes.set_title(f"{setup.devices} x {device.name}", fontsize=10)
        axes.set_xlabel("tokens/s")
    panels[0].legend(fontsize=8, loc="lower right")
    save(figure, path)


def _is_claimed(strategy: Strategy, setup: Setup) -> bool:
    is_baseline = strategy.mesh == setup.baseline.mesh
    return strategy.name in CLAIMS and (strategy.name != BASELINE.strategy or is_baseline)


def draw_ring(path: Path, stages: int = 4, rounds: int = 3) -> None:
    """Group of each stage in each tick, and the way of the first group's token back to stage 0."""
    figure = Figure(figsize=(11, 2.8), layout="constrained")
    axes = figure.subplots()
    ticks = stages * rounds
    for s in range(stages):
        for t in range(s, ticks):
            group = (t - s) % stages
            colour = GROUP_COLOURS[group % len(GROUP_COLOURS)]
            axes.barh(s, 1, left=t, height=0.86, color=colour, edgecolor="white")
            axes.text(t + 0.5, s, f"g{group}", ha="center", va="center", fontsize=9)
    arrow = {"arrowstyle": "->", "color": RED, "lw": 1.4}
    for r in range(1, rounds):
        axes.annotate(
            "", (stages * r + 0.15, 0.3), (stages * r - 0.15, stages - 1.3), arrowprops=arrow
        )
    for r in range(1, rounds + 1):
        axes.axvline(stages * r, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xticks(
        [t + 0.5 for t in range(ticks)],
        [f"{t}\nplace {t % stages}" for t in range(ticks)],
        fontsize=8,
    )
    axes.set_yticks(range(stages), [f"stage {s}" for s in range(stages)])
    axes.set(
        ylim=(stages - 0.5, -0.5),
        xlim=(0, ticks),
        xlabel="tick, and which place of its own every stage uses",
    )
    axes.set_title(
        "the sampled token of group 0 goes from the last stage to the first (red)", fontsize=10
    )
    save(figure, path)


def draw_memory(setup: Setup, devices: Sequence[DeviceSpec], path: Path) -> None:
    """Left: a layer's weights per device against the cache. Right: bytes a device reads per
    step.
    """
    figure = Figure(figsize=(12, 4), layout="constrained")
    shares, reads = figure.subplots(1, 2)
    ways = list(range(1, 33))
    for bits, name in WIDTHS.items():
        held = setup.model.layer_weights * bits / 8 / MIB
        shares.plot(ways, [held / each for each in ways], label=f"a layer's weights at {name}")
        fits = cache_verdict(setup, devices[0]).tensor_ways[bits]
        shares.plot([fits], [held / fits], "o", color="black", ms=4)
        shares.annotate(
            f"{fits} ways", (fits, held / fits), (4, 5), textcoords="offset points", fontsize=8
        )
    for device, style in zip(devices, ("--", ":"), strict=False):
        shares.axhline(
            device.usable_l2_bytes / MIB,
            color="black",
            linestyle=style,
            label=f"usable L2, {device.name}",
        )
    shares.set(xscale="log", yscale="log", xlabel="tensor ways", ylabel="MiB a device")
    shares.set_xticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
    shares.minorticks_off()
    shares.legend(fontsize=7)
    rows = [row for row in rows_to_show(setup, devices[0]) if row.fits_memory][::-1]
    names = [f"{row.strategy.name}, {shape_text(row.strategy)}" for row in rows]
    weights = [_weights_read(row) / 1e9 for row in rows]
    caches = [row.state_bytes / 1e9 for row in rows]
    reads.barh(names, weights, color=RED, label="weights, as often as they are read")
    reads.barh(names, caches, left=weights, color=GREY, label="keys and values")
    reads.axvline(
        devices[0].usable_l2_bytes / 1e9, color="black", linestyle="--", label="usable L2"
    )
    reads.set_xlabel("GB that a device reads from memory in a step")
    reads.legend(fontsize=7, loc="lower right")
    save(figure, path)


def _weights_read(row: Prediction) -> float:
    """Bytes of weights that a device reads per step, once per group."""
    return row.weight_bytes * row.strategy.num_groups(row.work.batch)


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DOTS_PER_INCH)
