"""The plan's stages against the capacity, and the losses of both runs."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.quickstart.training import Losses
from experiments.stage_bars import COLOURS, MIB, draw_bars
from layerwise_jax.plan import Plan

matplotlib.use("Agg")


def draw(plan: Plan, losses: Sequence[Losses], path: Path) -> Path:
    """Draw both panels into a file of the kind that the path's suffix names; returns the path."""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    stages, curves = figure.subplots(1, 2, width_ratios=[3, 2])
    draw_stages(stages, plan)
    draw_losses(curves, losses)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def draw_stages(axes: Axes, plan: Plan) -> None:
    """A bar a stage, from its weights, activations and workspace, under the line of the
    capacity.
    """
    heights = draw_bars(axes, plan, list(COLOURS), fontsize=8)
    if plan.capacity:
        axes.axhline(plan.capacity / MIB, linestyle="--", color="black", label="capacity")
    axes.set_ylim(0, 1.3 * max([*heights, (plan.capacity or 0) / MIB]))  # room for the legend
    axes.set_xlabel("stage, and its layers")
    axes.set_title(f"{plan.num_stages} stages, {plan.num_microbatches} microbatches")
    axes.legend(ncols=4, loc="upper center", frameon=False)


def draw_losses(axes: Axes, losses: Sequence[Losses]) -> None:
    """Both runs' loss at every step; where they are equal the staged run's dashes lie on the
    unstaged run's line.
    """
    axes.plot([loss.unstaged for loss in losses], color="#c9cdd6", linewidth=6, label="unstaged")
    axes.plot(
        [loss.staged for loss in losses],
        color="#c44e52",
        linewidth=1.5,
        linestyle="--",
        label="staged",
    )
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a byte")
    axes.set_title("the same training, staged and not")
    axes.legend(frameon=False)
