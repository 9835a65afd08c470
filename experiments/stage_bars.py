"""What stages hold, as stacked bars."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from layerwise_jax._tables import run_lengths
from layerwise_jax.plan import Plan

MIB = 2**20
COLOURS = {"weights": "#4c72b0", "activations": "#dd8452", "workspace": "#a1a8b8"}


def draw_bars(axes: Axes, plan: Plan, labels: Sequence[str], fontsize: int) -> list[float]:
    """A bar a stage, from weights, activations and workspace, which `labels` name; returns the
    heights in MiB.
    """
    parts = {
        "weights": [stage.weight_bytes / MIB for stage in plan.stages],
        "activations": [stage.activation_bytes / MIB for stage in plan.stages],
        "workspace": [stage.buffer_bytes / MIB for stage in plan.stages],
    }
    heights = [0.0] * plan.num_stages
    for (name, sizes), label in zip(parts.items(), labels, strict=True):
        axes.bar(
            range(plan.num_stages),
            sizes,
            bottom=heights,
            color=COLOURS[name],
            label=label,
            width=0.7,
        )
        heights = [height + size for height, size in zip(heights, sizes, strict=True)]
    names = [
        run_lengths(stage.layers).replace("..", "..\n").replace(", ", "\n") for stage in plan.stages
    ]
    axes.set_xticks(
        range(plan.num_stages), [f"{s}\n{name}" for s, name in enumerate(names)], fontsize=fontsize
    )
    axes.set_ylabel("MiB a stage, one microbatch")
    return heights
