"""Ways of training a subject, each as one compiled step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.training.subjects import Subject, accumulating_step, descend, unstaged_step
from layerwise_jax import Pipeline, build_pipeline
from layerwise_jax.mesh import STAGE
from layerwise_jax.schedule import Schedule, ScheduleName, lower_schedule, one_f_one_b
from layerwise_jax.trace import trace_layers


@dataclass(frozen=True)
class Way:
    """A way of training by a pipeline.

    Attributes:
      name: as the tables have it.
      schedule: by which schedule: a name, or what makes one of (stages, microbatches); None
        differentiates through the whole pipeline instead.
      remat: as `build_pipeline` takes it.
      stages_per_device: stages that share a device.
      checkpointed: whether the model itself has `jax.checkpoint` around its blocks.
    """

    name: str
    schedule: ScheduleName | Callable[[int, int], Schedule] | None
    remat: Literal["stage"] | None = "stage"
    stages_per_device: int = 1
    checkpointed: bool = False


DIFFERENTIATED = Way("differentiated through", None)
CHECKPOINTED = Way("differentiated through, checkpointed", None, checkpointed=True)
SCHEDULED = (
    Way("GPipe", "gpipe"),
    Way("1F1B", "1f1b"),
    Way("1F1B, stored", "1f1b", None),
    Way("interleaved 1F1B", "interleaved_1f1b", "stage", 2),
    Way("zero bubble", "zero_bubble"),
)
# The textbook's 1F1B, which holds fewer microbatches and takes more ticks.
UNPAIRED = Way("1F1B, one action a tick", one_f_one_b)
# What the rival's schedules are compared with: it keeps residuals too.
STORED = (
    Way("GPipe, stored", "gpipe", None),
    Way("interleaved 1F1B, stored", "interleaved_1f1b", None, 2),
    Way("zero bubble, stored", "zero_bubble", None),
)


@dataclass(frozen=True, eq=False)
class Program:
    """A step from (params, *batch) to (params, loss), and its initial parameters.

    `stash_slots` is how many microbatches the fullest device holds for their backward, None where
    nothing is stashed.
    """

    name: str
    step: Callable[..., Any]
    params: Any
    batch: tuple[jax.Array, ...]
    stash_slots: int | None = None


def stage(subject: Subject, way: Way, num_stages: int, num_microbatches: int) -> Pipeline:
    """The subject's loss as a pipeline over emulated devices, with equal counts of blocks per
    stage.
    """
    num_devices = num_stages // way.stages_per_device
    layers = trace_layers(subject.loss, subject.params, *subject.inputs)
    after = [layers.names.index(name) + 1 for name in subject.last_blocks(num_stages)]
    return build_pipeline(
        layers,
        (0, *after, len(layers)),
        Mesh(np.array(jax.devices()[:num_devices]), (STAGE,)),
        num_microbatches,
        reduce="mean",
        schedule=way.schedule(num_stages, num_microbatches)
        if callable(way.schedule)
        else way.schedule or "1f1b",
        remat=way.remat,
    )


def staged_program(subject: Subject, way: Way, num_stages: int, num_microbatches: int) -> Program:
    pipeline = stage(subject, way, num_stages, num_microbatches)
    value_and_grad = pipeline.value_and_grad if way.schedule else jax.value_and_grad(pipeline)

    def step(params: Any, *inputs: jax.Array) -> tuple[Any, jax.Array]:
        loss, grads = value_and_grad(params, *inputs)
        return descend(params, grads), loss

    slots = lower_schedule(pipeline.schedule).num_stash_slots if way.schedule else None
    return Program(
        way.name, step, pipeline.place(subject.params), subject.batch(num_microbatches), slots
    )


def unstaged_programs(subject: Subject, num_microbatches: int) -> list[Program]:
    """Programs on one device: the whole batch, and microbatches in sequence."""
    batch = subject.batch(num_microbatches)
    return [
        Program("unstaged", unstaged_step(subject), subject.params, batch),
        Program(
            "accumulating", accumulating_step(subject, num_microbatches), subject.params, batch
        ),
    ]


def device_bytes(compiled: Any, batch: tuple[jax.Array, ...]) -> dict[str, int]:
    """Bytes per device from the compiler; the batch, replicated on all devices, is separate."""
    sizes = compiled.memory_analysis()
    inputs = sum(x.nbytes for x in batch)
    return {
        "temporary": sizes.temp_size_in_bytes,
        "inputs": inputs,
        "total": sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        + sizes.temp_size_in_bytes
        - sizes.alias_size_in_bytes,
    }
