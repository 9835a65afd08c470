"""`layerwise`: all of the pass, from a function to a pipeline, with a default for every choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from layerwise_jax._arguments import checked_int
from layerwise_jax.batch.outputs import Reduce
from layerwise_jax.build import build_pipeline, check_choices
from layerwise_jax.cost.capacity import capacity_bound, row_chunks_to_fit, streaming_notes
from layerwise_jax.cost.device import DeviceSpec
from layerwise_jax.cost.layer_cost import LayerCost
from layerwise_jax.measure.detect import detect_device
from layerwise_jax.measure.microbatch import Staging, StagingChoices, choose_staging
from layerwise_jax.mesh import STAGE, check_mesh, stage_mesh
from layerwise_jax.partition.solver import CapacityError
from layerwise_jax.pipeline import Pipeline, Remat
from layerwise_jax.plan import Sizes
from layerwise_jax.schedule.generators import ScheduleName
from layerwise_jax.schedule.table import Schedule
from layerwise_jax.stage.checks import check_stageable
from layerwise_jax.stage.inputs import batch_size, first_rows
from layerwise_jax.trace.layers import LayerSequence, trace_layers
from layerwise_jax.trace.program import nbytes


def layerwise(
    fn: Callable[..., Any],
    params: Any,
    *inputs: Any,
    mesh: Mesh | None = None,
    num_stages: int | None = None,
    num_microbatches: int | Literal["auto"] = "auto",
    device: DeviceSpec | None = None,
    capacity: Literal["l2"] | int | None = "l2",
    method: Literal["dp", "greedy"] = "dp",
    reduce: Reduce | None = None,
    in_axes: Any = 0,
    state: Callable[[Any], Any] | None = None,
    batch_statistics: Literal["per_microbatch"] | None = None,
    schedule: ScheduleName | Schedule = "1f1b",
    remat: Remat | None = "stage",
    trainable: Any = None,
) -> Pipeline:
    """Make `fn` run layer-wise.

    Args:
      fn: a JAX function `fn(params, *inputs)`: a Flax model's `apply`, a loss, or plain JAX.
      params: its parameters, arrays or `jax.ShapeDtypeStruct`.
      *inputs: its inputs at the full batch, likewise; their leading axis is split into
        microbatches.
      mesh: a mesh with an axis `stage` (and possibly `data`); None puts a stage on each local
        device.
      num_stages: stages; None for as many as the mesh has devices on `stage`, or as there are
        layers. A multiple of the devices with the schedule "interleaved_1f1b" (None: two a device).
      num_microbatches: parts of the batch on each replica; "auto" for the fewest that fit and fill
        the pipeline.
      device: the device to size stages for, which need not be there; None for the one that JAX has.
      capacity: "l2" for the device's usable cache, a number of bytes, or None to balance without a
        cap. Stages that share a device share its capacity. What a stage holds in its forward pass
        is held against it, not what training stashes and accumulates besides (`measure_costs` with
        `backward=True` counts that).
      method: "dp" for the exact optimum, "greedy" for the paper's greedy layer aggregation.
      reduce: how outputs without a batch axis (a loss) combine over microbatches: "mean" or "sum".
      in_axes: as in `jax.vmap`, over the inputs: 0 for what is split, None for what every
        microbatch gets whole.
      state: picks from fn's outputs new values of some parameters, such as running averages.
      batch_statistics: "per_microbatch" if operations may mix the examples of a microbatch.
      schedule: the order of forwards and backwards in training: a name, or a table of one's own (a
        `Schedule`).
      remat: "stage" if backward runs a stage again from what it received, None if residuals are
        stashed.
      trainable: which parameters `value_and_grad` differentiates: a tree of booleans, or a function
        from the types of the parameters to one.

    Raises:
      CapacityError, BatchError, CutError, ValueError: what came, what was wanted, and what to do.
    """
    check_choices(reduce=reduce, batch_statistics=batch_statistics, remat=remat)
    replicas, num_devices, num_stages = _ways(mesh, num_stages, schedule, fn, params, inputs)
    spec = device or detect_device()
    if not isinstance(spec, DeviceSpec):
        raise ValueError(f"device is {device!r}; a DeviceSpec is wanted: lw.H100, say.")
    capacity_bytes = _capacity_bytes(capacity, spec)
    choices = StagingChoices(
        trace=lambda rows: _trace(fn, params, first_rows(inputs, in_axes, rows)),
        num_examples=_examples_of_a_replica(inputs, in_axes, replicas),
        num_stages=num_stages,
        device=spec,
        capacity=None if capacity_bytes is None else capacity_bytes * num_devices // num_stages,
        method=method,
        stages_per_device=num_stages // num_devices,
    )
    if isinstance(schedule, Schedule) and num_microbatches == "auto":
        num_microbatches = schedule.num_microbatches
    staging = _stage(choices, num_microbatches)
    return build_pipeline(
        staging.layers,
        staging.partition,
        stage_mesh(num_devices) if mesh is None else mesh,
        staging.num_microbatches,
        in_axes=in_axes,
        reduce=reduce,
        state=state,
        batch_statistics=batch_statistics,
        schedule=schedule,
        remat=remat,
        trainable=trainable,
        sizes=_sizes(choices, staging),
    )


def _examples_of_a_replica(inputs: tuple[Any, ...], in_axes: Any, replicas: int) -> int:
    batch = batch_size(inputs, in_axes)
    if batch % replicas:
        raise ValueError(
            f"A batch of {batch} does not split over {replicas} replicas (the mesh's axis 'data')."
        )
    return batch // replicas


def _trace(fn: Callable[..., Any], params: Any, microbatch: tuple[Any, ...]) -> LayerSequence:
    """The layers of one microbatch, if they can be staged: to find out comes before anything is
    compiled.
    """
    layers = trace_layers(fn, params, *microbatch)
    check_stageable(layers.program)
    return layers


def _capacity_bytes(capacity: str | int | None, device: DeviceSpec) -> int | None:
    if capacity == "l2":
        return device.usable_l2_bytes
    if isinstance(capacity, str | bool):
        raise ValueError(f"capacity is {capacity!r}; 'l2', a number of bytes or None is wanted.")
    return capacity


def _stage(choices: StagingChoices, num_microbatches: int | str) -> Staging:
    """Cut the layers, with the number of microbatches that was asked for or the best.

    Raises:
      CapacityError: they do not fit; with the capacity law for the model, and what would fit.
      ValueError: the microbatches do not divide the batch.
    """
    try:
        if num_microbatches == "auto":
            return choose_staging(choices)
        count = int(num_microbatches) if isinstance(num_microbatches, int | np.integer) else 0
        if count < 1 or choices.num_examples % count:
            raise ValueError(
                f"{choices.num_examples} examples on each replica do not split into "
                f"{num_microbatches!r} microbatches. "
                "Choose a whole number that divides them, or 'auto'."
            )
        return choices.measured(count)
    except CapacityError as error:
        raise _with_verdict(error, choices) from None


def _with_verdict(error: CapacityError, choices: StagingChoices) -> CapacityError:
    gauge = choices.gauge(choices.num_examples)
    costs = gauge.costs()
    error = error.with_note(_verdict(costs, gauge.layers, choices))
    if error.layers is None or choices.capacity is None:
        return error
    layer = costs[error.layers[0]]
    chunks = row_chunks_to_fit(layer, choices.capacity)
    if chunks is None:
        return error
    if chunks == 1:
        return error.with_note(f"At one example a microbatch '{layer.name}' fits.")
    return error.with_note(
        f"At one example a microbatch '{layer.name}' fits if its rows are run in {chunks} chunks."
    )


def _verdict(costs: Sequence[LayerCost], layers: LayerSequence, choices: StagingChoices) -> str:
    """The capacity law for these layers on these devices."""
    shared = choices.stages_per_device
    capacity = None if choices.capacity is None else choices.capacity * shared
    weights = sum(nbytes(layers.program.avals[value]) for value in layers.program.weights)
    num_devices = choices.num_stages // shared
    return str(capacity_bound(costs, choices.device, num_devices, _bits(layers), capacity, weights))


def _bits(layers: LayerSequence) -> int:
    """Bits of a weight, by the largest leaf."""
    return max(layers.signature.params_avals, key=nbytes).dtype.itemsize * 8


def _sizes(choices: StagingChoices, staging: Staging) -> Sizes:
    """What the plan says of sizes: layers, compiled stages, and what of it streams."""
    groups = [staging.costs[a:b] for a, b in staging.partition.stages]
    notes = [_verdict(staging.costs, staging.layers, replace(choices, capacity=None))]
    if choices.capacity is None:
        notes += streaming_notes(groups, choices.device)
    return Sizes(
        costs=staging.costs,
        device=choices.device.name,
        measured_on=f"{staging.gauge.compiler}, {staging.gauge.num_compiles} programs compiled",
        capacity=choices.capacity,
        notes=tuple(notes),
        stage_bytes=staging.stage_bytes,
    )


def _ways(
    mesh: Mesh | None,
    num_stages: int | None,
    schedule: ScheduleName | Schedule,
    fn: Any,
    params: Any,
    inputs: tuple[Any, ...],
) -> tuple[int, int, int]:
    """(replicas, devices of each, stages) that were asked for, or that devices, schedule and layers
    suggest.
    """
    num_stages = None if num_stages is None else checked_int("num_stages", num_stages)
    if mesh is not None and not isinstance(mesh, Mesh):
        raise ValueError(
            f"mesh came as {type(mesh).__name__}; a jax.sharding.Mesh with an axis 'stage' is "
            "wanted."
        )
    if isinstance(schedule, Schedule) or schedule == "interleaved_1f1b":
        return _ways_around(mesh, num_stages, schedule)
    if mesh is not None:
        return check_mesh(mesh, num_stages), mesh.shape[STAGE], mesh.shape[STAGE]
    num_stages = num_stages or min(jax.local_device_count(), len(trace_layers(fn, params, *inputs)))
    return 1, num_stages, num_stages


def _ways_around(
    mesh: Mesh | None, num_stages: int | None, schedule: Literal["interleaved_1f1b"] | Schedule
) -> tuple[int, int, int]:
    """(replicas, devices of each, stages) where a device may have several stages."""
    if isinstance(schedule, Schedule):
        num_devices, num_stages = schedule.num_devices, num_stages or schedule.num_stages
    elif mesh is not None:
        num_devices = mesh.shape.get(STAGE, 1)
    else:
        most = jax.local_device_count()
        num_devices = max(d for d in range(1, most + 1) if (num_stages or 2 * most) % d == 0)
    count: int = num_stages or 2 * num_devices
    if count % num_devices:
        raise ValueError(
            f"{count} stages do not go round {num_devices} devices evenly; a multiple of the "
            "devices is wanted."
        )
    return check_mesh(mesh, num_devices) if mesh else 1, num_devices, count
