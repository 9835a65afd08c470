"""Picture of a plan's stages against the cache: sums over layers, and compiled as one program."""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from layerwise_jax import Plan
from layerwise_jax.cost import DeviceSpec
from layerwise_jax.examples import COLOURS, draw_bars

matplotlib.use("Agg")

MIB = 2**20


def draw_plan(plan: Plan, device: DeviceSpec, title: str, path: Path) -> Path:
    """Draws one column per stage; returns `path`."""
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.subplots()
    _draw_stages(axes, plan)
    axes.axhline(device.usable_l2_bytes / MIB, linestyle="--", color="black", label="usable cache")
    axes.axhline(device.l2_bytes / MIB, linestyle=":", color="grey", label="cache as reported")
    axes.set_ylim(0, 1.3 * max(device.l2_bytes / MIB, *(stage.size / MIB for stage in plan.stages)))
    axes.set_title(
        f"{title}: {plan.num_stages} x {plan.device}, {plan.num_microbatches} microbatches",
        fontsize=10,
    )
    axes.legend(ncols=3, loc="upper center", frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def _draw_stages(axes: Axes, plan: Plan) -> None:
    draw_bars(axes, plan, [f"{name}, added up" for name in COLOURS], fontsize=7)
    compiled = [
        (s, stage.compiled_bytes / MIB)
        for s, stage in enumerate(plan.stages)
        if stage.compiled_bytes
    ]
    if compiled:
        axes.plot(
            *zip(*compiled, strict=True), "D", color="#c44e52", label="compiled as one program"
        )
