"""`layerwise`: all of the pass, from a function to a pipeline, with a default for every choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from layerwise_jax.cost import LayerCost
from layerwise_jax.detect import detect_device
from layerwise_jax.device_spec import DeviceSpec
from layerwise_jax.inputs import batch_size, first_rows
from layerwise_jax.layers import LayerSequence, trace_layers
from layerwise_jax.measure import measure_costs
from layerwise_jax.partition import partition_layers
from layerwise_jax.pipeline import Pipeline, Reduce, build_pipeline
from layerwise_jax.placement import STAGE
from layerwise_jax.plan import Sizes
from layerwise_jax.program import nbytes
from layerwise_jax.refusals import check_mesh

# A pipeline with four microbatches a stage idles for less than a fifth of its ticks.
MICROBATCHES_PER_STAGE = 4


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
) -> Pipeline:
    """Make `fn` run layer-wise.

    Args:
      fn: a JAX function `fn(params, *inputs)`: a Flax model's `apply`, a loss, or plain JAX.
      params: its parameters, arrays or `jax.ShapeDtypeStruct`.
      *inputs: its inputs at the full batch, likewise; their leading axis is split into microbatches.
      mesh: a mesh with an axis `stage` (and possibly `data`); None puts a stage on each local device.
      num_stages: stages; None for as many as the mesh has devices on `stage`, or as there are layers.
      num_microbatches: parts that the batch is split into on each replica; "auto" for the largest divisor of the batch
        up to four a stage.
      device: the device to size stages for; None for the one that JAX has.
      capacity: "l2" for the device's usable cache, a number of bytes, or None to balance without a cap.
      method: "dp" for the exact optimum, "greedy" for the paper's greedy layer aggregation.
      reduce: how outputs without a batch axis (a loss) combine over microbatches: "mean" or "sum".
      in_axes: as in `jax.vmap`, over the inputs: 0 for what is split, None for what every microbatch gets whole.
      state: picks from fn's outputs new values of some parameters, such as running averages.
      batch_statistics: "per_microbatch" if operations may mix the examples of a microbatch.

    Raises:
      CapacityError: a layer, or the model, does not fit the capacity.
      BatchError: splitting the batch would change the result.
      CutError: the program cannot be cut.
      ValueError: anything else that came wrong, named.
    """
    spec = device or detect_device()
    replicas, wanted = _ways(mesh, num_stages)
    batch = batch_size(inputs, in_axes)
    count = _num_microbatches(num_microbatches, batch, replicas, wanted)
    layers = trace_layers(fn, params, *first_rows(inputs, in_axes, batch // (count * replicas)))
    if mesh is None:
        mesh = stage_mesh(wanted if num_stages else min(wanted, len(layers)))
    costs = measure_costs(layers)
    cap = spec.usable_l2_bytes if capacity == "l2" else capacity
    seconds, cut_seconds = roofline_seconds(layers, costs, spec)
    partition = partition_layers(costs, mesh.shape[STAGE], cap, method, seconds=seconds, cut_seconds=cut_seconds)
    return build_pipeline(
        layers,
        partition,
        mesh,
        count,
        in_axes=in_axes,
        reduce=reduce,
        state=state,
        batch_statistics=batch_statistics,
        sizes=Sizes(costs, spec.name, jax.default_backend(), cap),
    )


def roofline_seconds(
    layers: LayerSequence, costs: Sequence[LayerCost], device: DeviceSpec
) -> tuple[list[float], list[float]]:
    """What layers take on a device, and what crossing each boundary takes.

    A layer takes the longer of its arithmetic and of reading what it holds from the cache; a boundary takes its bytes
    over the link's bandwidth. The link's latency is left out: the loop pays it once a tick, wherever the cuts are.

    Returns:
      Seconds of n layers; seconds of n + 1 boundaries, zero at both ends.
    """
    dtype = str(max(layers.signature.params_avals, key=nbytes).dtype)
    seconds = [device.seconds(cost.flops, cost.size, dtype, resident=True) for cost in costs]
    inner = [sent / device.link_bandwidth for sent in layers.boundary_bytes[1:-1]]
    return seconds, [0.0, *inner, 0.0]


def stage_mesh(num_stages: int) -> Mesh:
    """A mesh of the first local devices, all on the axis `stage`.

    Raises:
      ValueError: there are fewer devices than stages.
    """
    devices = jax.local_devices()
    if len(devices) < num_stages:
        raise ValueError(
            f"{num_stages} stages need {num_stages} devices; there are {len(devices)}. Ask for fewer stages, or "
            "emulate devices on the CPU: jax.config.update('jax_num_cpu_devices', n) before anything else."
        )
    return Mesh(np.array(devices[:num_stages]), (STAGE,), axis_types=(AxisType.Auto,))


def _ways(mesh: Mesh | None, num_stages: int | None) -> tuple[int, int]:
    """(replicas, stages) that were asked for, or that the devices suggest."""
    if num_stages is not None and num_stages < 1:
        raise ValueError(f"num_stages is {num_stages}; at least one stage is wanted.")
    if mesh is None:
        return 1, num_stages or jax.local_device_count()
    replicas = check_mesh(mesh, num_stages)
    return replicas, mesh.shape[STAGE]


def _num_microbatches(asked: int | str, batch: int, replicas: int, num_stages: int) -> int:
    """Microbatches on each replica.

    Raises:
      ValueError: they do not divide the batch.
    """
    if asked == "auto":
        if batch % replicas:
            raise ValueError(f"A batch of {batch} does not split over {replicas} replicas (the mesh's axis 'data').")
        most = MICROBATCHES_PER_STAGE * num_stages
        return max(m for m in range(1, most + 1) if batch // replicas % m == 0)
    if not isinstance(asked, int) or asked < 1 or batch % (asked * replicas):
        raise ValueError(
            f"A batch of {batch} does not split into {asked!r} microbatches"
            + (f" on each of {replicas} replicas" if replicas > 1 else "")
            + ". Choose a number that divides it, or 'auto'."
        )
    return asked
