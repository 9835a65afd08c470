"""Picture of the curve: bandwidth over working set, with cache, knee and both bandwidths."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from experiments.calibrate.curve import Calibration
from experiments.calibrate.reads import MIB, Reading
from layerwise_jax.cost import DeviceSpec

matplotlib.use("Agg")

TERA = 1e12


def draw_curve(
    spec: DeviceSpec, readings: Sequence[Reading], found: Calibration, path: Path
) -> Path:
    """Draw the curve; returns the path of the picture."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    sizes = [reading.working_set / MIB for reading in readings]
    axes.plot(
        sizes,
        [reading.bandwidth / TERA for reading in readings],
        "o-",
        color="#3182bd",
        label="read bandwidth",
    )
    axes.axvline(
        spec.l2_bytes / MIB,
        color="grey",
        linestyle=":",
        label=f"L2 as reported, {spec.l2_bytes / MIB:.0f} MiB",
    )
    axes.axvline(
        found.knee / MIB, color="#de2d26", linestyle="--", label=f"knee, {found.knee / MIB:.1f} MiB"
    )
    for bandwidth, name in ((found.l2_bandwidth, "cache"), (found.memory_bandwidth, "memory")):
        axes.axhline(bandwidth / TERA, color="#31a354", linewidth=0.8, linestyle="-.")
        axes.annotate(
            f"{name} {bandwidth / TERA:.2f} TB/s",
            (sizes[-1], bandwidth / TERA),
            ha="right",
            va="bottom",
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks([8, 16, 32, 64, 128, 256, 512], ["8", "16", "32", "64", "128", "256", "512"])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("working set, MiB")
    axes.set_ylabel("bytes read a second, TB/s")
    axes.set_title(f"{spec.name}: one persistent kernel reads its working set over and over")
    axes.legend(loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
