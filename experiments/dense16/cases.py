"""Sizes that are measured: for GPUs, and toys for emulated devices."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from experiments.dense16.model import PRESETS, Dense
from experiments.dense16.names import MEASURABLE

Scale = Literal["gpu", "toy"]
Part = Literal["l2", "decode", "stage", "sizes", "residency", "counters"]
# What matters most first.
PARTS: dict[Scale, tuple[Part, ...]] = {
    "gpu": MEASURABLE,
    "toy": ("decode", "stage", "residency"),
}

MIB = 2**20
# Distinct weights that are streamed: several times the largest cache.
STREAMED_BYTES = 256 * MIB
# Layers by the MiB of their weights in 16 bits: (heads, width of the feed-forward).
LAYER_SIZES = {8: (4, 3072), 16: (8, 2048), 24: (8, 4096), 32: (8, 6144), 48: (8, 10_240)}
# Sequences of a group and the positions of each, so that caches are small beside the weights.
RESIDENT_GROUPS = ((8, 128), (32, 128), (128, 16), (128, 32))
CACHE_BYTES = 45 * 10**9  # the most that the caches of one stage's loop may take


@dataclass(frozen=True)
class DecodeCase:
    """A model that all strategies decode with, and the step counts of a short and a long
    program.
    """

    model: Dense
    counts: tuple[int, int]


@dataclass(frozen=True)
class StageCase:
    """A stage without neighbours.

    Attributes:
      model: the stage; its batch is the sequences of a group.
      groups: groups that take turns.
      copies: sets of weights that take turns.
      ticks: of a round.
      rounds: of a program.
    """

    model: Dense
    groups: int
    copies: int
    ticks: int
    rounds: int

    @property
    def weights(self) -> str:
        """Name of the weights' use: "resident" with one set, "streaming" with several in turn."""
        return "resident" if self.copies == 1 else "streaming"

    def record(self) -> dict[str, Any]:
        """Fields of the record, besides those of the model."""
        model = self.model
        return {
            "weights": self.weights,
            "stage_weight_bytes": model.layers * model.layer_bytes,
            "group_cache_bytes": model.layers * model.batch * model.sequence_bytes,
            "groups": self.groups,
            "copies": self.copies,
        }


def decode_cases(scale: Scale, part: Part, num_devices: int) -> list[DecodeCase]:
    """Cases of the parts `l2`, `decode` and `sizes`, which all strategies run."""
    if scale == "toy":
        return [DecodeCase(toy_model(num_devices), (0, 6))]
    if part == "decode":
        exact = PRESETS["exact"]
        return [DecodeCase(each, (4, 20)) for each in (exact, replace(exact, layers=2, batch=128))]
    if part == "l2":
        heads, mlp = LAYER_SIZES[8]
        deep = replace(PRESETS["l2"], layers=8, heads=heads, mlp=mlp)
        models = [
            replace(model, batch=batch) for model in (PRESETS["l2"], deep) for batch in (32, 128)
        ]
        return [DecodeCase(model, (16, 112)) for model in (*models, replace(deep, batch=8))]
    layers = [
        replace(PRESETS["l2"], layers=2, heads=heads, mlp=mlp)
        for heads, mlp in LAYER_SIZES.values()
    ]
    return [
        DecodeCase(replace(layer, batch=batch), (16, 112))
        for batch in (8, 128, 32)
        for layer in layers[:3]
    ]


def stage_cases(scale: Scale) -> list[StageCase]:
    """One layer of the exact size, or a toy, with several sizes of a group."""
    if scale == "toy":
        return [
            StageCase(
                replace(toy_model(1), layers=1, batch=4), groups=2, copies=1, ticks=4, rounds=2
            )
        ]
    found = []
    for microbatch in (8, 16, 32, 128):
        model = replace(PRESETS["exact"], layers=1, batch=microbatch)
        groups = min(8, CACHE_BYTES // (microbatch * model.sequence_bytes))
        found.append(
            StageCase(
                model, groups, copies=1, ticks=groups, rounds=max(2, 512 // (groups * microbatch))
            )
        )
    return found


def residency_cases(scale: Scale) -> list[tuple[StageCase, StageCase]]:
    """Pairs of stages: every tick reads the same weights, or several sets take turns."""
    if scale == "toy":
        model = replace(toy_model(1), layers=1, batch=2)
        return [(StageCase(model, 2, 1, 4, 2), StageCase(model, 2, 4, 4, 2))]
    found = []
    for microbatch, context in RESIDENT_GROUPS:
        for heads, mlp in LAYER_SIZES.values():
            model = replace(
                PRESETS["l2"], layers=1, heads=heads, mlp=mlp, batch=microbatch, context=context
            )
            copies = 2 * -(-STREAMED_BYTES // (2 * model.layer_bytes))
            cases = [
                StageCase(model, 2, sets, copies, rounds=128 // copies) for sets in (1, copies)
            ]
            found.append((cases[0], cases[1]))
    return found


def counter_cases(scale: Scale) -> list[StageCase]:
    """All stages that are timed without neighbours."""
    return [*(case for pair in residency_cases(scale) for case in pair), *stage_cases(scale)]


def toy_model(num_devices: int) -> Dense:
    """A model for emulated devices, with one layer and one head per device."""
    many = max(4, num_devices)
    return replace(PRESETS["tiny"], layers=many, heads=many, batch=max(16, many))
