"""Brute force: every partition of a few layers, costed by loops that follow the words of the
definition.
"""

import itertools
import math
from typing import Any

import numpy as np

INFEASIBLE = math.inf


def stage_load(
    instance: dict[str, Any], start: int, stop: int, device: int, in_flight: int
) -> float:
    """Seconds of a stage, infinity where the stage is refused."""
    members = range(start, stop)
    for group in instance.get("keep_together", ()):
        if any(layer in members for layer in group) and not {min(group), max(group)} <= set(
            members
        ):
            return INFEASIBLE
    if any(first in members and last in members for first, last in instance.get("keep_apart", ())):
        return INFEASIBLE
    if (start, stop) in instance.get("forbidden", ()):
        return INFEASIBLE
    load = sum(instance["seconds"][layer] for layer in members) / _of_device(
        instance.get("speeds"), device, 1.0
    )
    capacity = _of_device(instance.get("capacity"), device, math.inf)
    excess = max(0.0, stage_bytes(instance, start, stop, in_flight) - capacity)
    if excess > 0 and instance.get("streaming_bandwidth") is None:
        return INFEASIBLE
    if excess > 0:
        load += excess / instance["streaming_bandwidth"]
    cuts = instance.get("cut_seconds")
    if cuts is None:
        return load
    if instance.get("communication") == "overlap":
        return max(load, cuts[start], cuts[stop])
    return load + cuts[start] + cuts[stop]


def stage_bytes(instance: dict[str, Any], start: int, stop: int, in_flight: int) -> float:
    members = range(start, stop)
    total = sum(instance["weight_bytes"][layer] for layer in members)
    for layers, size in instance.get("tied_weights", ()):
        used = sum(layer in members for layer in layers)
        total -= size * max(0, used - 1)
    if instance.get("stash_bytes") is not None:
        total += in_flight * sum(instance["stash_bytes"][layer] for layer in members)
    if instance.get("transient_bytes") is not None:
        total += max(instance["transient_bytes"][layer] for layer in members)
    return total


def partitions(instance: dict[str, Any]):
    """(boundaries, loads) of every partition that no constraint refuses."""
    layers, most = len(instance["seconds"]), instance["max_stages"]
    counts = [most] if instance.get("exactly") else range(1, min(layers, most) + 1)
    for count in counts:
        for inner in itertools.combinations(range(1, layers), count - 1):
            boundaries = (0, *inner, layers)
            for devices in _devices(instance, count):
                loads = _loads(instance, boundaries, devices)
                if max(loads) < INFEASIBLE:
                    yield boundaries, loads


def best_value(instance: dict[str, Any]) -> float | tuple[int, float]:
    """The smallest objective over all partitions, infinity if there is none; for "stages" (stages,
    bottleneck).
    """
    return min((value_of(instance, loads) for _, loads in partitions(instance)), default=INFEASIBLE)


def value_of(instance: dict[str, Any], loads: list[float]) -> Any:
    objective, extra = (
        instance.get("objective", "bottleneck"),
        instance.get("num_microbatches", 1) - 1,
    )
    if objective == "stages":
        return len(loads), max(loads)
    if objective == "makespan":
        return sum(loads) + extra * max(loads)
    if objective == "lockstep_makespan":
        return (extra + (instance["max_stages"] if differs(instance) else len(loads))) * max(loads)
    return max(loads)


def differs(instance: dict[str, Any]) -> bool:
    """True if the devices differ."""
    return any(
        len(set(np.atleast_1d(instance.get(name, 1)).tolist())) > 1
        for name in ("capacity", "speeds")
    )


def _loads(
    instance: dict[str, Any], boundaries: tuple[int, ...], devices: tuple[int, ...]
) -> list[float]:
    count = len(devices)
    loads = []
    for stage, device in enumerate(devices):
        to_the_end = instance["max_stages"] - device if differs(instance) else count - stage
        in_flight = instance.get("num_microbatches", 1)
        if instance.get("schedule", "1f1b") == "1f1b":
            in_flight = min(in_flight, to_the_end)
        loads.append(
            stage_load(instance, boundaries[stage], boundaries[stage + 1], device, in_flight)
        )
    return loads


def _devices(instance: dict[str, Any], count: int):
    return (
        itertools.combinations(range(instance["max_stages"]), count)
        if differs(instance)
        else [tuple(range(count))]
    )


def _of_device(values: Any, device: int, default: float) -> float:
    if values is None:
        return default
    return values if np.ndim(values) == 0 else values[device]
