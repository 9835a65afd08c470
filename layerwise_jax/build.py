"""Build a pipeline from layers and cut points: every step from the flat program to the compiled
loop, in order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from layerwise_jax._arguments import checked_int
from layerwise_jax.batch.analysis import analyze_batching
from layerwise_jax.batch.outputs import Reduce
from layerwise_jax.measure.layers import measured_by_shape
from layerwise_jax.mesh import STAGE, check_mesh
from layerwise_jax.pipeline import Pipeline, Remat
from layerwise_jax.plan import Plan, Sizes, make_plan
from layerwise_jax.schedule.generators import (
    ScheduleName,
    make_schedule,
)
from layerwise_jax.schedule.table import Schedule
from layerwise_jax.stage.align import align_stages
from layerwise_jax.stage.checks import (
    check_draws,
    check_stageable,
    check_state,
    find_frozen,
    find_state,
)
from layerwise_jax.stage.cut import cut_stages
from layerwise_jax.stage.inputs import input_axes
from layerwise_jax.stage.slots import assign_slots
from layerwise_jax.stage.staged_program import StagedProgram
from layerwise_jax.stage.wiring import wire
from layerwise_jax.trace.layers import LayerSequence
from layerwise_jax.trace.program import nbytes

CHOICES = {"reduce": ("mean", "sum"), "batch_statistics": ("per_microbatch",), "remat": ("stage",)}


def build_pipeline(
    layers: LayerSequence,
    partition: Any,
    mesh: Mesh,
    num_microbatches: int,
    *,
    in_axes: Any = 0,
    reduce: Reduce | None = None,
    state: Callable[[Any], Any] | None = None,
    batch_statistics: Literal["per_microbatch"] | None = None,
    sizes: Sizes | None = None,
    schedule: ScheduleName | Schedule = "1f1b",
    remat: Remat | None = "stage",
    trainable: Any = None,
    skip_bubbles: bool | None = None,
    bubble_fill: float = 0.0,
) -> Pipeline:
    """Build the pipeline of traced layers.

    Args:
      layers: the layers of one microbatch.
      partition: a `Partition`, or its boundaries (0, ..., number of layers).
      mesh: a mesh with an axis `stage` of as many devices as there are stages, and possibly an axis
        `data` of replicas that split the batch. With an interleaved schedule the devices may be
        fewer: they divide the stages, and stage s lives on device s % devices.
      num_microbatches: microbatches that each replica runs.
      in_axes: as in `jax.vmap`, over the inputs: 0 for what microbatches split, None for what each
        gets whole. Random keys and scalars are never split.
      reduce: how outputs without a batch axis combine over microbatches.
      state: picks from the function's outputs a part of its parameters with new values (running
        averages): a tree with the same paths as the parameters have. Microbatches update it in
        their order.
      batch_statistics: "per_microbatch" accepts operations that mix the examples of a batch, each
        microbatch then being a batch of its own; None refuses them.
      sizes: what was measured of the layers, for the plan; None for weights and outputs by shape
        alone.
      schedule: the order of forwards and backwards in training: a name, or a table of one's own (a
        `Schedule`).
      remat: what backward has to go by: "stage" runs the stage again from what it received; None
        keeps what the function's own derivative keeps, its `jax.checkpoint` policies included, for
        as many microbatches as the schedule has between forward and backward.
      trainable: a tree of booleans with the parameters' structure or a prefix of it, or a function
        from the parameters' types to one: which parameters `value_and_grad` differentiates. None
        for all.
      skip_bubbles: whether devices branch around the work while they have no microbatch. None for
        where it helps: on emulated devices, which share the processor; an accelerator that waits
        for the others anyway is spared the branch.
      bubble_fill: what idle stages compute on; NaN shows that nothing of it leaks.

    Raises:
      ValueError: the mesh does not fit the partition; see `CutError`, `BatchError` for what cannot
        be staged.
    """
    boundaries = tuple(getattr(partition, "boundaries", partition))
    num_microbatches = checked_int("num_microbatches", num_microbatches)
    num_stages = len(boundaries) - 1
    order = make_schedule(schedule, num_stages, num_microbatches, mesh.shape.get(STAGE, num_stages))
    replicas = check_mesh(mesh, order.num_devices)
    check_choices(reduce=reduce, batch_statistics=batch_statistics, remat=remat)
    check_stageable(layers.program)
    signature = layers.signature
    axes = input_axes(
        jax.tree.unflatten(signature.inputs_tree, list(signature.inputs_avals)), in_axes
    )
    new_state = find_state(layers, state, replicas)
    batching = analyze_batching(
        layers,
        axes,
        num_microbatches * replicas,
        reduce=reduce,
        statistics=batch_statistics,
        state=tuple(new_state),
    )
    check_draws(batching.program, new_state)
    layers = layers.with_program(batching.program)
    loop = _staged_program(
        layers,
        boundaries,
        num_devices=order.num_devices,
        num_microbatches=num_microbatches,
        in_axes=axes,
        new_state=new_state,
        frozen=find_frozen(layers, trainable),
        bubble_fill=bubble_fill,
    )
    plan = _plan(partition, loop, sizes or measured_by_shape(layers))
    skips = mesh.devices.flat[0].platform == "cpu" if skip_bubbles is None else skip_bubbles
    return Pipeline(layers, mesh, loop, batching, plan, reduce, order, remat, skips)


def _staged_program(
    layers: LayerSequence,
    boundaries: tuple[int, ...],
    *,
    num_devices: int,
    num_microbatches: int,
    in_axes: Any,
    new_state: Any,
    frozen: Any,
    bubble_fill: float,
) -> StagedProgram:
    """Layers cut into stages, aligned on their common body, wired and given weight slots."""
    program = layers.program
    stages = cut_stages(layers, boundaries)
    check_state(new_state, stages)
    alignment = align_stages(layers, boundaries, stages, with_body=not new_state)
    placement = assign_slots(
        program,
        stages,
        alignment,
        layers.signature,
        num_devices,
        state=new_state,
        kinds=dict.fromkeys(frozen, "frozen"),
    )
    return StagedProgram(
        program,
        stages,
        alignment,
        wire(program, stages, alignment),
        placement,
        num_devices,
        num_microbatches,
        in_axes,
        new_state,
        frozen,
        bubble_fill,
    )


def check_choices(**choices: str | None) -> None:
    """Refuse words that no option has.

    Raises:
      ValueError: naming the option and its words.
    """
    for name, choice in choices.items():
        if choice is not None and choice not in CHOICES[name]:
            raise ValueError(
                f"{name} is {choice!r}; {', '.join(map(repr, CHOICES[name]))} or None is wanted."
            )


def _plan(partition: Any, loop: StagedProgram, sizes: Sizes) -> Plan:
    sends = [sum(nbytes(loop.program.avals[x]) for x in stage.sends) for stage in loop.stages]
    return make_plan(
        partition,
        sizes,
        send_bytes=sends,
        num_devices=loop.num_devices,
        num_microbatches=loop.num_microbatches,
        num_ticks=loop.num_ticks,
        padding_bytes=loop.placement.padding_bytes,
        common_layers=loop.alignment.num_layers,
        has_branch=loop.wiring.needs_branch,
    )
