"""`layerwise`: from a function to a pipeline, in the order of the steps, with defaults."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh

from layerwise_jax import processes
from layerwise_jax._arguments import checked_choice, checked_int
from layerwise_jax._jax import no_context_mesh
from layerwise_jax.build import build_pipeline
from layerwise_jax.cost.capacity import (
    CapacityBound,
    capacity_bound,
    residency,
    row_chunks_to_fit,
    streaming_notes,
)
from layerwise_jax.cost.device import DeviceSpec
from layerwise_jax.cost.layer_cost import LayerCost
from layerwise_jax.cost.memory import LEVELS
from layerwise_jax.measure.detect import detect_device
from layerwise_jax.measure.layers import measured_by_shape
from layerwise_jax.measure.microbatch import Staging, StagingChoices, choose_staging
from layerwise_jax.mesh import STAGE, check_mesh, stage_mesh
from layerwise_jax.options import Executor, PipelineOptions, Remat
from layerwise_jax.partition.solver import CapacityError
from layerwise_jax.pipeline import Pipeline
from layerwise_jax.plan import Sizes
from layerwise_jax.schedule.registry import SCHEDULES, ScheduleName
from layerwise_jax.schedule.table import Schedule
from layerwise_jax.stage.checks import check_stageable, find_frozen
from layerwise_jax.stage.inputs import batch_size, first_rows
from layerwise_jax.stage.state import find_state
from layerwise_jax.trace.layers import LayerSequence, trace_layers
from layerwise_jax.trace.program import nbytes


@no_context_mesh()
def layerwise(
    fn: Callable[..., Any],
    params: Any,
    *inputs: Any,
    mesh: Mesh | None = None,
    num_stages: int | None = None,
    num_microbatches: int | Literal["auto"] = "auto",
    device: DeviceSpec | None = None,
    capacity: Literal["auto", "l2", "shared", "memory"] | int | None = "auto",
    method: Literal["dp", "greedy"] = "dp",
    reduce: Any = "auto",
    in_axes: Any = 0,
    state: Callable[[Any], Any] | Literal["mutated"] | None = None,
    batch_statistics: Literal["per_microbatch"] | None = None,
    schedule: ScheduleName | Schedule = "1f1b",
    remat: Remat | None = "stage",
    trainable: Any = None,
    executor: Executor = "auto",
) -> Pipeline:
    """Make `fn` run layer-wise.

    Args:
      fn: a JAX function `fn(params, *inputs)`: a Flax model's `apply`, a loss, or plain JAX.
      params: its parameters, arrays or `jax.ShapeDtypeStruct`.
      *inputs: its inputs at the full batch, arrays or types. Microbatches split their leading axis.
      mesh: a mesh with an axis `stage` (and possibly `data`); None puts a stage on each local
        device.
      num_stages: stages; None for as many as the mesh has devices on `stage`, or as there are
        layers. With a schedule of several stages a device: the multiple that `SCHEDULES` has (None:
        two a device).
      num_microbatches: microbatches of each replica; "auto" for the fewest that fit the capacity
        and fill the pipeline.
      device: the device to size stages for; it need not be present. None for the local one.
      capacity: "auto" takes the device's usable L2 as a target: a model that does not fit is
        balanced without a cap, and the plan says so first. A name of one of the device's memory
        levels ("l2", "shared", "memory"), or bytes, is a hard cap. None balances without a cap.
        Stages that share a device share its capacity. The cap counts a stage's forward pass, not
        what training stashes and accumulates (`measure_costs` with `backward=True` counts that).
      method: "dp" for the exact optimum, "greedy" for the paper's greedy layer aggregation.
      reduce: how outputs without a batch axis (a loss) combine over microbatches. "auto" infers it;
        "mean", "sum", "count", "max" or "min" asserts it, a tree of words for each output.
      in_axes: as in `jax.vmap`, over the inputs: 0 for those that microbatches split, None for
        those that every microbatch gets whole.
      state: picks from fn's outputs new values of some parameters, such as running averages;
        "mutated" for the nnx Variables that fn mutates, as `nnx.jit` updates them.
      batch_statistics: "per_microbatch" accepts operations that mix the examples of a microbatch.
      schedule: order of forwards and backwards in training: a name, or a `Schedule`.
      remat: "stage" recomputes a stage's forward in its backward, "cheap" keeps products and
        attention, None stashes residuals.
      trainable: the parameters that `value_and_grad` differentiates: a tree of booleans, or a
        function from the types of the parameters to one.
      executor: "loop" runs all stages in one program, which jit, grad and vmap accept; "host" runs
        each as separate programs, called without jit, for training with long ticks. "auto"
        chooses by the predicted tick.

    Raises:
      CapacityError: the layers do not fit the hard cap; the message begins with ways out.
      BatchError: a result would differ between the batch and its microbatches.
      CutError: the function cannot be split into stages.
      ValueError: an argument has another value than it takes. All of these say what to change.
    """
    options = PipelineOptions(
        in_axes=in_axes,
        reduce=reduce,
        state=state,
        batch_statistics=batch_statistics,
        schedule=schedule,
        remat=remat,
        trainable=trainable,
        executor=executor,
    )
    spec = _device(device)
    capacity_bytes = _capacity_bytes(capacity, spec)
    checked_choice("method", method, ("dp", "greedy"))
    replicas, num_devices, num_stages = _ways(mesh, num_stages, schedule, fn, params, inputs)
    choices = StagingChoices(
        trace=lambda rows: _trace(fn, params, first_rows(inputs, in_axes, rows), options),
        num_examples=_examples_of_a_replica(inputs, in_axes, replicas),
        num_stages=num_stages,
        device=spec,
        capacity=None if capacity_bytes is None else capacity_bytes * num_devices // num_stages,
        method=method,
        stages_per_device=num_stages // num_devices,
    )
    if isinstance(schedule, Schedule) and num_microbatches == "auto":
        num_microbatches = schedule.num_microbatches
    choices, staging = _stage(choices, num_microbatches, capacity)
    return build_pipeline(
        staging.layers,
        staging.partition,
        stage_mesh(num_devices) if mesh is None else mesh,
        staging.num_microbatches,
        sizes=_sizes(choices, staging),
        options=options,
    )


def _device(device: DeviceSpec | None) -> DeviceSpec:
    """The device to size stages for."""
    if device is None:
        return detect_device()
    if not isinstance(device, DeviceSpec):
        raise ValueError(
            f"device must be a DeviceSpec or None, got {device!r}. Pass for example lw.H100."
        )
    return device


def _capacity_bytes(capacity: str | int | None, device: DeviceSpec) -> int | None:
    """Usable bytes of a memory level, or the given bytes. "auto" is the L2."""
    if capacity is None:
        return None
    if isinstance(capacity, str):
        return device.level("l2" if capacity == "auto" else capacity).usable_bytes
    if isinstance(capacity, bool) or not isinstance(capacity, int | np.integer) or capacity < 1:
        raise ValueError(
            f"capacity must be 'auto', a memory level ({', '.join(map(repr, LEVELS))}), a positive "
            f"int (bytes) or None, got {capacity!r}."
        )
    return int(capacity)


def _examples_of_a_replica(inputs: tuple[Any, ...], in_axes: Any, replicas: int) -> int:
    batch = batch_size(inputs, in_axes)
    if batch % replicas:
        raise ValueError(
            f"The batch must be a multiple of the {replicas} replicas (the mesh's axis 'data'), "
            f"got {batch} examples."
        )
    return batch // replicas


def _trace(
    fn: Callable[..., Any], params: Any, microbatch: tuple[Any, ...], options: PipelineOptions
) -> LayerSequence:
    """The layers of one microbatch. Refuses what cannot be staged before anything is compiled."""
    layers = trace_layers(fn, params, *microbatch)
    check_stageable(layers.program)
    find_state(layers, options.state)
    find_frozen(layers, options.trainable)
    return layers


def _stage(
    choices: StagingChoices, num_microbatches: int | str, capacity: str | int | None
) -> tuple[StagingChoices, Staging]:
    """Cut the layers, with the given number of microbatches or the best one.

    Under the capacity "auto", layers that do not fit are balanced without a cap; the choices that
    come back then have none.

    Raises:
      CapacityError: the layers do not fit a hard cap; the message begins with ways out.
      ValueError: the microbatches do not divide the batch.
    """
    if capacity == "auto" and not _could_be_resident(choices, num_microbatches):
        choices = replace(choices, capacity=None)
    try:
        return choices, _staged(choices, num_microbatches)
    except CapacityError as error:
        if capacity == "auto":
            choices = replace(choices, capacity=None)
            return choices, _staged(choices, num_microbatches)
        raise _with_ways_out(error, choices, capacity) from None


def _staged(choices: StagingChoices, num_microbatches: int | str) -> Staging:
    """The layers cut with the given number of microbatches, or the best one for "auto"."""
    if num_microbatches == "auto":
        return choose_staging(choices)
    count = int(num_microbatches) if isinstance(num_microbatches, int | np.integer) else 0
    if count < 1 or choices.num_examples % count:
        raise ValueError(
            f"num_microbatches must be 'auto' or a divisor of the {choices.num_examples} "
            f"examples on each replica, got {num_microbatches!r}."
        )
    return choices.measured(count)


def _could_be_resident(choices: StagingChoices, num_microbatches: int | str) -> bool:
    """False if the weights by themselves exceed the caches, which needs no compilation."""
    count = choices.counts()[0] if num_microbatches == "auto" else num_microbatches
    if not isinstance(count, int) or count < 1 or choices.num_examples % count:
        return True  # refused later
    layers = choices.gauge(count).layers
    return _capacity_bound(measured_by_shape(layers).costs, layers, choices).is_resident


def _with_ways_out(
    error: CapacityError, choices: StagingChoices, capacity: str | int | None
) -> CapacityError:
    """The error, led by the ways out and the origin of the capacity, with the capacity bound."""
    measured = choices.gauge(choices.num_examples)
    costs = measured.costs()
    bound = _capacity_bound(costs, measured.layers, choices)
    ways = ["capacity=None or 'auto' balances without a cap"]
    layer = None if error.layers is None else costs[error.layers[0]]
    chunks = None if layer is None else row_chunks_to_fit(layer, choices.capacity or 0)
    if layer is not None and chunks is not None:
        in_chunks = "" if chunks == 1 else f" if its rows are run in {chunks} chunks"
        ways.append(f"At one example a microbatch '{layer.name}' fits{in_chunks}")
    if error.fewest_stages:
        ways.append(f"num_stages={error.fewest_stages} fits")
    ways.append(bound.ways_to_fit)
    lead = f"{'. '.join(ways)}. {_origin(choices, capacity)}"
    return error.with_lead(lead).with_note(str(bound))


def _origin(choices: StagingChoices, capacity: str | int | None) -> str:
    """A sentence: where the number of the capacity comes from."""
    shared = choices.stages_per_device
    each = "" if shared == 1 else f", shared by {shared} stages a device"
    if not isinstance(capacity, str):
        return f"The capacity of {capacity:,} bytes was given{each}."
    level = choices.device.level(capacity)
    source = choices.device.sources[f"usable_{capacity}_bytes"]
    return (
        f"The capacity of {level.usable_bytes:,} bytes is the usable {capacity} of "
        f"{choices.device.name}{each} ({source})."
    )


def _capacity_bound(
    costs: Sequence[LayerCost], layers: LayerSequence, choices: StagingChoices
) -> CapacityBound:
    """The capacity law for these layers on these devices."""
    shared = choices.stages_per_device
    capacity = None if choices.capacity is None else choices.capacity * shared
    weights = sum(nbytes(layers.program.avals[value]) for value in layers.program.weights)
    num_devices = choices.num_stages // shared
    return capacity_bound(costs, choices.device, num_devices, _bits(layers), capacity, weights)


def _bits(layers: LayerSequence) -> int:
    """Bits of a weight, by the largest leaf."""
    return max(layers.signature.params_avals, key=nbytes).dtype.itemsize * 8


def _sizes(choices: StagingChoices, staging: Staging) -> Sizes:
    """Sizes for the plan: layers, compiled stages, and notes on the weights that stream."""
    groups = [staging.costs[a:b] for a, b in staging.partition.stages]
    shared = choices.stages_per_device
    bound = _capacity_bound(staging.costs, staging.layers, replace(choices, capacity=None))
    notes = [str(bound)]
    if choices.capacity is None:
        notes += streaming_notes(groups, choices.device)
    return Sizes(
        costs=staging.costs,
        device=choices.device.name,
        measured_on=f"{staging.gauge.compiler}, {staging.gauge.num_compiles} programs compiled",
        capacity=choices.capacity,
        notes=tuple(notes),
        stage_bytes=staging.stage_bytes,
        residency=residency(groups, choices.device, bound, shared),
        load_unit="s",
    )


def _ways(
    mesh: Mesh | None,
    num_stages: int | None,
    schedule: ScheduleName | Schedule,
    fn: Any,
    params: Any,
    inputs: tuple[Any, ...],
) -> tuple[int, int, int]:
    """(replicas, pipeline devices of each, stages): as given, or as devices and layers suggest."""
    num_stages = None if num_stages is None else checked_int("num_stages", num_stages)
    if mesh is not None and not isinstance(mesh, Mesh):
        raise ValueError(
            "mesh must be a jax.sharding.Mesh with an axis 'stage' or None, got "
            f"{type(mesh).__name__}."
        )
    if isinstance(schedule, Schedule) or SCHEDULES[schedule].stages_per_device != 1:
        return _interleaved_ways(mesh, num_stages, schedule)
    if mesh is not None:
        return check_mesh(mesh, num_stages), mesh.shape[STAGE], mesh.shape[STAGE]
    num_stages = num_stages or min(len(processes.devices()), len(trace_layers(fn, params, *inputs)))
    return 1, num_stages, num_stages


def _interleaved_ways(
    mesh: Mesh | None, num_stages: int | None, schedule: ScheduleName | Schedule
) -> tuple[int, int, int]:
    """The same where a device may have several stages."""
    if isinstance(schedule, Schedule):
        num_devices, count = schedule.num_devices, num_stages or schedule.num_stages
    else:
        family = SCHEDULES[schedule]
        most = len(processes.devices()) if mesh is None else mesh.shape.get(STAGE, 1)
        num_devices = family.num_devices(num_stages, most) if mesh is None else most
        count = num_stages or family.num_stages(num_devices)
        family.checked_stages_per_device(schedule, count, num_devices)
    return check_mesh(mesh, num_devices) if mesh else 1, num_devices, count
