"""Random small partitioning problems, over all objectives and cost structures."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def random_instance(seed: int) -> dict[str, Any]:
    """Keywords of `solve`; every feature is there in some of the instances, in most of them the
    numbers are whole.
    """
    draw = np.random.default_rng(seed)
    layers = int(draw.integers(1, 8))
    instance: dict[str, Any] = {
        "seconds": _times(draw, layers, 10),
        "weight_bytes": _numbers(draw, layers, 10),
        "max_stages": int(draw.integers(1, 6)),
    }
    _add_costs(draw, instance, layers)
    _add_constraints(draw, instance, layers)
    _add_objective(draw, instance)
    return instance


def _add_costs(draw: np.random.Generator, instance: dict[str, Any], layers: int) -> None:
    if _sometimes(draw):
        instance["transient_bytes"] = _numbers(draw, layers, 8)
    if _sometimes(draw):
        instance["cut_seconds"] = [0, *_times(draw, layers - 1, 8), 0]
        instance["communication"] = str(draw.choice(["add", "overlap"]))
    if _sometimes(draw):
        instance["stash_bytes"] = _numbers(draw, layers, 4)
        instance["schedule"] = str(draw.choice(["1f1b", "gpipe"]))
        instance["num_microbatches"] = int(draw.integers(1, 6))
    if _sometimes(draw) and layers > 1:
        tied = sorted(
            draw.choice(layers, size=int(draw.integers(2, layers + 1)), replace=False).tolist()
        )
        instance["tied_weights"] = [
            (tied, int(min(instance["weight_bytes"][layer] for layer in tied)))
        ]


def _add_constraints(draw: np.random.Generator, instance: dict[str, Any], layers: int) -> None:
    stages = instance["max_stages"]
    if _sometimes(draw, 0.7):
        least = max(instance["weight_bytes"])
        instance["capacity"] = int(draw.integers(least, 3 * least + 5))
        if _sometimes(draw):
            instance["capacity"] = draw.integers(0, 3 * least + 5, size=stages).tolist()
        if _sometimes(draw, 0.2):
            instance["streaming_bandwidth"] = float(draw.integers(1, 4))
    if _sometimes(draw, 0.2):
        instance["speeds"] = draw.choice([0.5, 1.0, 2.0, 4.0], size=stages).tolist()
    if _sometimes(draw, 0.2) and layers > 2:
        first = int(draw.integers(0, layers - 1))
        instance["keep_together"] = [[first, int(draw.integers(first + 1, layers))]]
    elif _sometimes(draw, 0.2) and layers > 2:
        instance["keep_apart"] = [sorted(draw.choice(layers, size=2, replace=False).tolist())]


def _add_objective(draw: np.random.Generator, instance: dict[str, Any]) -> None:
    instance["objective"] = str(
        draw.choice(["bottleneck", "bottleneck", "stages", "makespan", "lockstep_makespan"])
    )
    instance.setdefault("num_microbatches", int(draw.integers(1, 9)))
    if instance["objective"] != "stages":
        instance["exactly"] = bool(_sometimes(draw, 0.2))


def _times(draw: np.random.Generator, count: int, most: int) -> Sequence[float]:
    """Whole numbers, now and then fractions that floats do not hold exactly."""
    if _sometimes(draw):
        return (draw.random(count) * most).tolist()
    return _numbers(draw, count, most)


def _numbers(draw: np.random.Generator, count: int, most: int) -> list[int]:
    """Whole numbers, now and then mostly zeros."""
    values = draw.integers(0, most + 1, size=count)
    if _sometimes(draw, 0.15):
        values = values * (draw.random(count) < 0.4)
    return values.tolist()


def _sometimes(draw: np.random.Generator, share: float = 0.3) -> bool:
    return bool(draw.random() < share)
