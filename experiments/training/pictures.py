"""Pictures of the measurements."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no screen is needed, and none may be there

import matplotlib.pyplot as plt

from layerwise_jax.schedule import ScheduleSimulation, draw_timeline

MIB = 2**20
DOTS_PER_INCH = 130


def draw_memory(figures: Mapping[str, Any], path: Path) -> None:
    """Temporary bytes over microbatches: one panel per kind of stages, one line per way of
    training.
    """
    kinds = figures["stages"]
    figure, panels = plt.subplots(
        1, len(kinds), figsize=(6 * len(kinds), 4.5), sharey=True, squeeze=False
    )
    counts = figures["microbatches"]
    for axes, (kind, found) in zip(panels[0], kinds.items(), strict=True):
        for name, held in found["ways"].items():
            style = "--" if name.startswith("differentiated") else "-"
            axes.plot(
                counts, [sizes["temporary"] / MIB for sizes in held], style, marker="o", label=name
            )
        axes.set(xscale="log", yscale="log", xlabel="microbatches", title=f"{kind} stages")
        axes.set_xticks(counts, [str(count) for count in counts], minor=False)
        axes.minorticks_off()
    panels[0][0].set_ylabel("temporary MiB a device")
    panels[0][-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    _save(figure, path)


def draw_step_time(figures: Mapping[str, Any], path: Path) -> None:
    """Processor time of a step over the unstaged step's: one panel per subject, one bar per
    program.
    """
    subjects = figures["subjects"]
    figure, panels = plt.subplots(1, len(subjects), figsize=(5 * len(subjects), 5), squeeze=False)
    for axes, (name, found) in zip(panels[0], subjects.items(), strict=True):
        _draw_ratios(axes, found["programs"], "", "#6baed6")
        if found["rival"]:
            _draw_ratios(
                axes, found["rival"]["programs"], f", JAX {found['rival']['jax']}", "#fdae6b"
            )
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set(title=name, xlabel="processor time over the unstaged step's")
        axes.invert_yaxis()
    _save(figure, path)


def _draw_ratios(axes: Any, programs: Mapping[str, Any], jax: str, colour: str) -> None:
    base = statistics.median(programs["unstaged"]["cpu_seconds"])
    others = {name: figures for name, figures in programs.items() if name != "unstaged"}
    ratios = [statistics.median(figures["cpu_seconds"]) / base for figures in others.values()]
    axes.barh([name + jax for name in others], ratios, color=colour)


def draw_schedules(simulations: Mapping[str, ScheduleSimulation], path: Path) -> None:
    """Timelines of the schedules, one below the other on one time axis."""
    figure, panels = plt.subplots(
        len(simulations), 1, figsize=(13, 2.4 * len(simulations)), squeeze=False
    )
    longest = max(simulation.makespan for simulation in simulations.values())
    for axes, (name, simulation) in zip(panels[:, 0], simulations.items(), strict=True):
        draw_timeline(simulation, axes)
        axes.set_title(f"{name}: {axes.get_title()}")
        axes.set(
            xlim=(0, longest), xlabel=""
        )  # the label would lie upon the legend, and the title has the unit
    _save(figure, path)


def draw_losses(figures: Mapping[str, Any], path: Path) -> None:
    """Losses of both runs over steps, one panel per subject."""
    runs = figures["subjects"]
    figure, panels = plt.subplots(1, len(runs), figsize=(6 * len(runs), 4), squeeze=False)
    for axes, (name, run) in zip(panels[0], runs.items(), strict=True):
        axes.plot(run["unstaged"], color="#fdae6b", linewidth=5, label="unstaged")
        axes.plot(run["staged"], color="#08519c", linewidth=1.2, label="staged")
        axes.set(title=name, xlabel="step", ylabel="loss (nats)")
        axes.legend(frameon=False)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=DOTS_PER_INCH, bbox_inches="tight")
    plt.close(figure)
