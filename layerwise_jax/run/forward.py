"""The forward tick loop of a pipeline, as it runs on one device inside `shard_map`.

In tick t stage s works on microbatch t - s: it runs its branch (if stages differ), the common body,
and sends what the next stage needs. Bubbles (ticks in which a stage has no microbatch) compute on a
fill value, and what they make is replaced by zeros before anything uses it, gradients included.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax

from layerwise_jax.run.stage import LocalStage, MicrobatchContext
from layerwise_jax.run.wire import fill, to_wire, wire_aval
from layerwise_jax.stage.staged_program import StagedProgram
from layerwise_jax.stage.wiring import Output

Carry = tuple[list[Any], list[Any], list[Any]]


def run_forward(
    loop: StagedProgram, weights: Sequence[Any], inputs: Sequence[Any], replica: Any
) -> tuple[list[Any], list[Any]]:
    """All ticks on this device.

    Args:
      loop: the pipeline.
      weights: this stage's row of every slot, in the weight's own shape.
      inputs: every input leaf: (microbatches, ...) where it is split, whole otherwise.
      replica: this device's index on the data axis.

    Returns:
      Every output, stacked over microbatches and zero except on the stage that makes it; the slots
      afterwards, which differ from `weights` in what is state.
    """
    device = LocalStage(loop, list(inputs), replica, gates=True)
    arrived = [fill(wire_aval(lane.aval), loop.bubble_fill) for lane in loop.wiring.lanes]
    kept = [fill(wire_aval(loop.program.avals[x]), loop.bubble_fill) for x, _ in loop.wiring.kept]
    ticks = jnp.arange(loop.num_ticks, dtype=jnp.int32)
    (_, _, slots), rows = lax.scan(partial(_tick, device), (arrived, kept, list(weights)), ticks)
    outputs = zip(loop.wiring.outputs, rows, strict=True)
    return [_collect(loop, output, row, device.stage) for output, row in outputs], slots


def _tick(device: LocalStage, carry: Carry, t: Any) -> tuple[Carry, list[Any]]:
    arrived, kept, slots = carry
    wiring = device.wiring
    now, before = (
        MicrobatchContext(device, t - device.stage),
        MicrobatchContext(device, t - device.stage - 1),
    )
    results = device.run_stage(now, arrived, slots, late=(before, kept))
    sent = [
        device.send(results.made(lane.source), lane.pairs(device.loop.num_devices), now)
        for lane in wiring.lanes
    ]
    kept = [to_wire(results.made(source)) for _, source in wiring.kept]
    return (sent, kept, results.slots), [
        to_wire(results.made(output.source)) for output in wiring.outputs
    ]


def _collect(loop: StagedProgram, output: Output, rows: Any, stage: Any) -> Any:
    """The ticks in which an output appears, zero on the stages that do not make it."""
    start = output.stage + output.lag
    made = lax.slice_in_dim(rows, start, start + loop.num_microbatches)
    return (
        made
        if loop.num_stages == 1
        else jnp.where(stage == output.stage, made, jnp.zeros_like(made))
    )
