"""Bytes of a compiled step, by the number of microbatches."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from experiments.training.staging import (
    CHECKPOINTED,
    DIFFERENTIATED,
    SCHEDULED,
    UNPAIRED,
    device_bytes,
    staged_program,
)
from experiments.training.subjects import Subject, mlp

WAYS = (DIFFERENTIATED, CHECKPOINTED, *SCHEDULED, UNPAIRED)


def subjects(num_blocks: int) -> dict[str, Callable[[bool], Subject]]:
    """Subjects by kind of stages (equal or not), as functions of `checkpointed`."""
    rising = [64 * (2 + block % 5) for block in range(num_blocks)]
    return {
        "equal": lambda checkpointed: mlp([256] * num_blocks, checkpointed=checkpointed),
        "unequal": lambda checkpointed: mlp(rising, checkpointed=checkpointed),
    }


def measure_memory(
    num_devices: int, microbatches: Sequence[int], progress: Callable[[str], None]
) -> dict[str, Any]:
    """Compile every way of training for every number of microbatches, each of them of the same
    size.

    Args:
      num_devices: devices of the pipeline.
      microbatches: numbers of microbatches, rising.
      progress: told of every program that is done.

    Returns:
      By kind of stages: its title, and for every way a list of `device_bytes` with the slots of
      the stash, in the order of `microbatches`.
    """
    figures: dict[str, Any] = {}
    for kind, make in subjects(2 * num_devices).items():
        ways: dict[str, list[dict[str, Any]]] = {}
        for way in WAYS:
            subject = make(way.checkpointed)
            ways[way.name] = []
            for count in microbatches:
                program = staged_program(subject, way, num_devices * way.stages_per_device, count)
                compiled = jax.jit(program.step).lower(program.params, *program.batch).compile()
                ways[way.name].append(
                    {**device_bytes(compiled, program.batch), "stash_slots": program.stash_slots}
                )
                progress(f"memory, {kind} stages, {way.name}, {count} microbatches")
        figures[kind] = {"title": make(False).title, "ways": ways}
    return {"devices": num_devices, "microbatches": list(microbatches), "stages": figures}


def growth(held: Sequence[dict[str, Any]]) -> float | None:
    """Relative growth of temporary memory from the fewest to the most microbatches of equal stash.

    A share of the latter; None if no two of them have equal stashes.
    """
    alike = [sizes for sizes in held if sizes["stash_slots"] == held[-1]["stash_slots"]]
    return held[-1]["temporary"] / alike[0]["temporary"] - 1 if len(alike) > 1 else None
