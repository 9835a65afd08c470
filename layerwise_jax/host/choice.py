"""Choice between the executors: the loop, or programs per stage driven by the host."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from layerwise_jax import processes
from layerwise_jax.cost.devices import device_named
from layerwise_jax.options import Executor, PipelineOptions
from layerwise_jax.schedule.table import Schedule, round_robin
from layerwise_jax.stage.staged_program import StagedProgram

# A call of a stage program costs the host 0.03 to 0.3 ms: below this tick the loop is faster.
SHORTEST_TICK_SECONDS = 2e-3
# Floating-point operations of forward and backward over those of forward.
TRAINING_FLOPS = 3.0
# The share of a device's nominal rate that training reaches.
EFFICIENCY = 0.5


def choose_executor(
    options: PipelineOptions,
    loop: StagedProgram,
    schedule: Schedule,
    mesh: Mesh,
    stage_flops: Sequence[float],
) -> Executor:
    """The executor that was asked for, or for "auto" the one that suits the pipeline.

    Host for what the loop does not run (stages that are not assigned round-robin), and for a loss
    whose predicted tick on an accelerator is long; else the loop, which composes with JAX's
    transformations.

    Args:
      options: what was asked for.
      loop: the staged program.
      schedule: the schedule.
      mesh: the mesh.
      stage_flops: of every stage's forward for one microbatch, 0 where not measured.
    """
    if options.executor != "auto":
        return options.executor
    if processes.are_of_several(list(mesh.devices.flat)):
        return "loop"
    # The loop assigns stage s to device s mod n; a V-shaped schedule does not.
    homes = tuple(schedule.device_of_stage[s] for s in range(schedule.num_stages))
    if homes != round_robin(len(homes), schedule.num_devices):
        return "host"
    seconds = tick_seconds(loop, mesh, stage_flops)
    return "host" if _is_loss(loop) and seconds >= SHORTEST_TICK_SECONDS else "loop"


def tick_seconds(loop: StagedProgram, mesh: Mesh, stage_flops: Sequence[float]) -> float:
    """Predicted seconds of the longest stage's forward and backward for one microbatch.

    0 on a CPU, whose emulated devices share the processor, and on a device that is not known.
    """
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        return 0.0
    try:
        spec = device_named(device.device_kind)
    except ValueError:
        return 0.0
    # The dtype that most entries of weights have says how products are computed.
    entries: dict[str, int] = {}
    for x in loop.program.weights:
        aval = loop.program.avals[x]
        entries[str(aval.dtype)] = entries.get(str(aval.dtype), 0) + int(np.prod(aval.shape))
    dtype = max(entries, key=entries.__getitem__)
    rate = spec.flops_per_second.get(dtype, max(spec.flops_per_second.values()))
    return TRAINING_FLOPS * max(stage_flops, default=0.0) / (EFFICIENCY * rate)


def _is_loss(loop: StagedProgram) -> bool:
    aval = loop.output_aval(0)
    return not aval.shape and jnp.issubdtype(aval.dtype, jnp.floating)
