"""Pictures of stages, timelines and losses (needs matplotlib)."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from layerwise_jax._tables import run_lengths
from layerwise_jax.examples.side_by_side import Losses
from layerwise_jax.pipeline import Pipeline
from layerwise_jax.plan import Plan
from layerwise_jax.schedule import draw_timeline, simulate_schedule

MIB = 2**20
COLOURS = {"weights": "#4c72b0", "activations": "#dd8452", "workspace": "#a1a8b8"}


def draw(pipeline: Pipeline, losses: Sequence[Losses], path: Path) -> Path:
    """Draw stages, timeline and losses; the suffix of `path` selects the format. Returns `path`."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    panels = figure.subplot_mosaic([["stages", "losses"], ["timeline"] * 2], width_ratios=[3, 2])
    draw_stages(panels["stages"], pipeline.plan)
    draw_losses(panels["losses"], losses)
    simulation = simulate_schedule(pipeline.schedule, forward_seconds=1, backward_seconds=2)
    draw_timeline(simulation, panels["timeline"])
    panels["timeline"].set_title(f"timeline of a step, bubble {simulation.bubble_share:.1%}")
    panels["timeline"].set_xlabel("time; one forward takes 1, one backward takes 2")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def draw_stages(axes: Axes, plan: Plan) -> None:
    """One bar per stage (weights, activations, workspace) below the line of the capacity."""
    heights = draw_bars(axes, plan, list(COLOURS), fontsize=8)
    if plan.capacity:
        axes.axhline(plan.capacity / MIB, linestyle="--", color="black", label="capacity")
    axes.set_ylim(0, 1.3 * max([*heights, (plan.capacity or 0) / MIB]))  # space for the legend
    axes.set_xlabel("stage and its layers")
    axes.set_title(f"{plan.num_stages} stages, {plan.num_microbatches} microbatches")
    axes.legend(ncols=4, loc="upper center", frameon=False)


def draw_bars(axes: Axes, plan: Plan, labels: Sequence[str], fontsize: int) -> list[float]:
    """One stacked bar per stage. `labels` names weights, activations and workspace in this order.

    Returns:
      Heights of the bars in MiB.
    """
    parts = {
        "weights": [stage.weight_bytes / MIB for stage in plan.stages],
        "activations": [stage.activation_bytes / MIB for stage in plan.stages],
        "workspace": [stage.buffer_bytes / MIB for stage in plan.stages],
    }
    positions = range(plan.num_stages)
    heights = [0.0] * plan.num_stages
    for (name, sizes), label in zip(parts.items(), labels, strict=True):
        axes.bar(positions, sizes, bottom=heights, color=COLOURS[name], label=label, width=0.7)
        heights = [height + size for height, size in zip(heights, sizes, strict=True)]
    names = [run_lengths(stage.layers) for stage in plan.stages]
    names = [name.replace("..", "..\n").replace(", ", "\n") for name in names]
    ticks = [f"{stage}\n{name}" for stage, name in enumerate(names)]
    axes.set_xticks(positions, ticks, fontsize=fontsize)
    axes.set_ylabel("MiB per stage, one microbatch")
    return heights


def draw_losses(axes: Axes, losses: Sequence[Losses]) -> None:
    """Losses of both runs at every step; where they are equal the dashes cover the wide line."""
    unstaged = [loss.unstaged for loss in losses]
    staged = [loss.staged for loss in losses]
    axes.plot(unstaged, color="#c9cdd6", linewidth=6, label="unstaged")
    axes.plot(staged, color="#c44e52", linewidth=1.5, linestyle="--", label="staged")
    axes.set_xlabel("step")
    axes.set_ylabel("loss in nats per byte")
    axes.set_title("staged and unstaged training")
    axes.legend(frameon=False)
