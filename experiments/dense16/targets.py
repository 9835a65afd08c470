"""Targets of the measurements on GPUs, and the figures reached."""

from collections.abc import Sequence
from typing import NamedTuple

from experiments.dense16.errors import TOLERANCE, calibrated_points
from experiments.dense16.measured import ratio, records_of
from experiments.dense16.model import PRESETS
from experiments.dense16.runs import Run, Setting
from experiments.grid import Grid

RING_OVER_TENSOR = 1.5
FLOOR_SHARE = 0.9
FLOOR_BATCH = 8
OVERHEAD_SECONDS = 20e-6
# Stages whose weights an H200's cache can hold.
LARGEST_RESIDENT = 48 * 2**20


class Target(NamedTuple):
    """Target, measured figure, and the verdict."""

    goal: str
    found: str
    is_reached: bool


def targets_grid(runs: Sequence[Run]) -> Grid | None:
    """One row per target that has a measurement."""
    found = [*_ring(runs), *_stage(runs), *_errors(runs), *_overhead(runs)]
    rows = [
        [target.goal, target.found, "reached" if target.is_reached else "missed"]
        for target in found
    ]
    return Grid("", ["target", "measured", ""], rows) if rows else None


def is_small(setting: Setting) -> bool:
    """True if a stage's weights fit an H200's cache."""
    return setting.layers // setting.devices * setting.layer_bytes <= LARGEST_RESIDENT


def _is_exact(setting: Setting) -> bool:
    return (setting.width, setting.mlp) == (PRESETS["paper"].width, PRESETS["paper"].mlp)


def _ring(runs: Sequence[Run]) -> list[Target]:
    """Layer-wise over tensor parallelism on two devices."""
    pairs = [pair for run in runs for pair in run.settings().items() if pair[0].devices == 2]
    found = []
    for goal, least, chosen in (
        (
            f"two H200s, a small model: layer-wise at least {RING_OVER_TENSOR} x TP=2",
            RING_OVER_TENSOR,
            is_small,
        ),
        ("two H200s, layers of the exact size: layer-wise at least equal to TP=2", 1.0, _is_exact),
    ):
        shares = [
            (share, s)
            for s, records in pairs
            if chosen(s) and (share := ratio(records, "layer-wise", "tensor"))
        ]
        if shares:
            most, setting = max(shares, key=lambda each: each[0])
            text = f"{most:.2f} ({setting}); {min(share for share, _ in shares):.2f} at the least"
            found.append(
                Target(goal, text if len(shares) > 1 else text.split(";")[0], most >= least)
            )
    return found


def _stage(runs: Sequence[Run]) -> list[Target]:
    shares = [
        r["floor_share"]
        for r in records_of(runs, "stage")
        if r["batch"] == FLOOR_BATCH and "floor_share" in r
    ]
    goal = (
        f"one stage of the exact size, {FLOOR_BATCH} sequences: {FLOOR_SHARE:.0%} of its "
        "memory floor"
    )
    return [Target(goal, f"{max(shares):.1%}", max(shares) >= FLOOR_SHARE)] if shares else []


def _errors(runs: Sequence[Run]) -> list[Target]:
    points = [point for run in runs for point in calibrated_points(run)]
    within = sum(abs(point.error) <= TOLERANCE for point in points)
    goal = f"predictions within {TOLERANCE:.0%} of measured tokens/s, calibrated on the run"
    return [Target(goal, f"{within} of {len(points)}", within == len(points))] if points else []


def _overhead(runs: Sequence[Run]) -> list[Target]:
    seconds = [
        r["overhead_seconds"] for r in records_of(runs, "overhead") if "overhead_seconds" in r
    ]
    goal = f"overhead of the ring at most {1e6 * OVERHEAD_SECONDS:.0f} us a tick"
    if not seconds:
        return []
    text = f"{1e6 * min(seconds):.1f} to {1e6 * max(seconds):.1f} us over its layers alone"
    ends = [
        r["overhead_over_ends_seconds"]
        for r in records_of(runs, "overhead")
        if "overhead_over_ends_seconds" in r
    ]
    if ends:
        text += (
            f", {1e6 * min(ends):.1f} to {1e6 * max(ends):.1f} over layers, embedding, head "
            "and sampling"
        )
    return [Target(goal, text, max(seconds) <= OVERHEAD_SECONDS)]
