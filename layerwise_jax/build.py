"""Builder of pipelines: traced layers and cut points become a staged program on a mesh."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from layerwise_jax import processes
from layerwise_jax._arguments import checked_int
from layerwise_jax._jax import no_context_mesh
from layerwise_jax._tables import bytes_text
from layerwise_jax.batch.analysis import BatchOptions, analyze_batching
from layerwise_jax.host.choice import choose_executor
from layerwise_jax.measure.layers import measured_by_shape
from layerwise_jax.mesh import STAGE, automatic, check_mesh
from layerwise_jax.options import PipelineOptions
from layerwise_jax.pipeline import Pipeline
from layerwise_jax.plan import LoopFigures, Plan, Sizes, make_plan
from layerwise_jax.schedule.registry import make_schedule
from layerwise_jax.schedule.table import Schedule
from layerwise_jax.stage.align import align_stages
from layerwise_jax.stage.checks import check_stageable, find_frozen
from layerwise_jax.stage.cut import cut_stages
from layerwise_jax.stage.hosts import HostTraffic, host_traffic
from layerwise_jax.stage.inputs import input_axes
from layerwise_jax.stage.slots import assign_slots
from layerwise_jax.stage.staged_program import StagedProgram
from layerwise_jax.stage.state import (
    State,
    check_carried,
    check_draws,
    find_state,
    split_state,
)
from layerwise_jax.stage.wiring import wire
from layerwise_jax.trace.layers import LayerSequence
from layerwise_jax.trace.program import nbytes

# Captured arrays that the plan names.
MOST_CAPTURED = 8


@no_context_mesh()
def build_pipeline(
    layers: LayerSequence,
    partition: Any,
    mesh: Mesh,
    num_microbatches: int,
    *,
    sizes: Sizes | None = None,
    options: PipelineOptions | None = None,
    **choices: Any,
) -> Pipeline:
    """Build the pipeline of traced layers.

    Args:
      layers: layers traced on one microbatch.
      partition: a `Partition`, or its boundaries (0, ..., number of layers).
      mesh: a mesh with an axis `stage` of as many devices as there are stages, and possibly an axis
        `data` of replicas that split the batch. An interleaved schedule may have fewer devices:
        see `SCHEDULES` for the stages that each device then has.
      num_microbatches: microbatches that each replica runs.
      sizes: measured sizes of the layers, for the plan; None for weights and outputs by shape.
      options: how the function is staged and run; None for the defaults.
      **choices: single options by name, which replace those in `options`: see `PipelineOptions`.

    Raises:
      ValueError: the mesh does not fit the partition, or an option has another value than it takes.
      CutError, BatchError: the function cannot be staged.
    """
    options = (options or PipelineOptions()).updated(**choices)
    boundaries = tuple(getattr(partition, "boundaries", partition))
    num_microbatches = checked_int("num_microbatches", num_microbatches)
    num_stages = len(boundaries) - 1
    num_devices = mesh.shape.get(STAGE, num_stages)
    schedule = make_schedule(options.schedule, num_stages, num_microbatches, num_devices)
    replicas = check_mesh(mesh, schedule.num_devices)
    mesh = automatic(mesh)
    check_stageable(layers.program)
    in_axes = _input_axes(layers, options.in_axes)
    new_values = find_state(layers, options.state)
    batch_options = BatchOptions(options.reduce, options.batch_statistics, tuple(new_values))
    parts = num_microbatches * replicas
    batching = analyze_batching(layers, in_axes, parts, batch_options)
    state = split_state(layers, new_values, [role.kind for role in batching.outputs], replicas)
    check_draws(batching.program, state.carried)
    loop = _staged_program(
        layers.with_program(batching.program),
        boundaries,
        schedule.num_devices,
        num_microbatches,
        in_axes=batching.in_axes,
        state=state,
        options=options,
    )
    sizes = sizes or measured_by_shape(layers)
    chosen = choose_executor(options, loop, schedule, mesh, _stage_flops(boundaries, sizes))
    plan = _plan(partition, loop, sizes)
    if (owners := processes.owners(mesh)) is not None:
        plan = replace(plan, notes=(*plan.notes, str(_traffic(owners, plan, schedule))))
    options = _with_defaults(options, mesh).updated(executor=chosen)
    return Pipeline(layers, mesh, loop, batching, plan, schedule, options)


def _with_defaults(options: PipelineOptions, mesh: Mesh) -> PipelineOptions:
    """The options, with the mesh's devices deciding what was left open."""
    if options.skip_bubbles is not None:
        return options
    return options.updated(skip_bubbles=mesh.devices.flat[0].platform == "cpu")


def _stage_flops(boundaries: tuple[int, ...], sizes: Sizes) -> list[float]:
    """Floating-point operations of every stage's forward for one microbatch; 0 if not measured."""
    return [sum(cost.flops for cost in sizes.costs[a:b]) for a, b in pairwise(boundaries)]


def _input_axes(layers: LayerSequence, in_axes: Any) -> tuple[int | None, ...]:
    """The batch axis (0 or None) of every input leaf."""
    signature = layers.signature
    inputs = jax.tree.unflatten(signature.inputs_tree, list(signature.inputs_avals))
    return input_axes(inputs, in_axes)


def _staged_program(
    layers: LayerSequence,
    boundaries: tuple[int, ...],
    num_devices: int,
    num_microbatches: int,
    *,
    in_axes: tuple[int | None, ...],
    state: State,
    options: PipelineOptions,
) -> StagedProgram:
    """Layers cut into stages, aligned on their common body, wired and given weight slots."""
    program = layers.program
    frozen = find_frozen(layers, options.trainable)
    stages = cut_stages(layers, boundaries)
    check_carried(state.carried, stages)
    alignment = align_stages(layers, boundaries, stages, with_body=not state.carried)
    renewed = state.renewed_weights(program)
    captured = frozenset(weight for weight in program.weights.values() if weight.is_captured)
    placement = assign_slots(
        program,
        stages,
        alignment,
        layers.signature,
        num_devices,
        state=state.carried,
        kinds={
            **dict.fromkeys(frozen, "frozen"),
            **dict.fromkeys(renewed, "renewed"),
            **dict.fromkeys(captured, "captured"),
        },
    )
    return StagedProgram(
        program=program,
        stages=stages,
        alignment=alignment,
        wiring=wire(program, stages, alignment),
        placement=placement,
        num_devices=num_devices,
        num_microbatches=num_microbatches,
        in_axes=in_axes,
        state=state.carried,
        renewed=state.renewed,
        frozen=frozen | renewed | captured,
        bubble_fill=options.bubble_fill,
    )


def _traffic(owners: np.ndarray, plan: Plan, schedule: Schedule) -> HostTraffic:
    """Bytes that cross between processes, given int[data, stage] processes of the devices."""
    return host_traffic(
        owners,
        [schedule.device_of_stage[stage] for stage in range(len(plan.stages))],
        [stage.send_bytes for stage in plan.stages],
        [stage.weight_bytes for stage in plan.stages],
        schedule.num_microbatches,
    )


def _captured_notes(loop: StagedProgram) -> list[str]:
    """A note for the plan: the arrays that the function closes over, with their stages."""
    signature, avals = loop.placement.signature, loop.program.avals
    stages: dict[int, list[int]] = {}
    sizes: dict[int, int] = {}
    for s, stage in enumerate(loop.stages):
        for value, weight in stage.weights.items():
            if weight.is_captured:
                stages.setdefault(weight.leaf, []).append(s)
                sizes[weight.leaf] = sizes.get(weight.leaf, 0) + nbytes(avals[value])
    if not stages:
        return []
    listed = [
        f"{signature.captured_names[leaf]} (stage {', '.join(map(str, sorted(set(on))))})"
        for leaf, on in list(stages.items())[:MOST_CAPTURED]
    ]
    more = len(stages) - len(listed)
    names = ", ".join(listed) + (f" and {more} more" if more else "")
    size = bytes_text(sum(sizes.values()))
    return [f"captured arrays, {size}, are placed as frozen weights: {names}"]


def _plan(partition: Any, loop: StagedProgram, sizes: Sizes) -> Plan:
    sends = [sum(nbytes(loop.program.avals[x]) for x in stage.sends) for stage in loop.stages]
    sizes = replace(sizes, notes=(*sizes.notes, *_captured_notes(loop)))
    return make_plan(
        partition,
        sizes,
        LoopFigures(
            send_bytes=sends,
            num_devices=loop.num_devices,
            num_microbatches=loop.num_microbatches,
            num_ticks=loop.num_ticks,
            padding_bytes=loop.placement.padding_bytes,
            common_layers=loop.alignment.num_layers,
            has_branch=loop.wiring.needs_branch,
        ),
    )
