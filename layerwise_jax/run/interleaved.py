"""The forward tick loop where a device has several stages: microbatches go round the devices, by a
schedule's table.

As in `forward.py`, but what arrives may have to wait, so that it goes through a buffer, and what
follows the last stage's body is run in the same tick as the body.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from layerwise_jax.run.buffers import empty_buffers, load, store
from layerwise_jax.run.outputs import add_output, start_output
from layerwise_jax.run.segment import segment_after_body
from layerwise_jax.run.stage import LocalStage, MicrobatchContext, StageResults
from layerwise_jax.run.wire import fill, from_wire, to_wire, wire_aval
from layerwise_jax.schedule.arrays import lower_schedule
from layerwise_jax.schedule.generators import forward_only
from layerwise_jax.stage.staged_program import StagedProgram

Carry = tuple[list[Any], list[Any], list[Any], list[Any]]


def run_forward_in_rounds(
    loop: StagedProgram,
    roles: Sequence[str],
    weights: Sequence[Any],
    inputs: Sequence[Any],
    replica: Any,
) -> tuple[list[Any], list[Any]]:
    """All ticks on this device.

    Args:
      loop: the pipeline.
      roles: for every output, how microbatches combine: "rows", "reduced" or "whole".
      weights: this device's row of every slot, in the weight's own shape.
      inputs: every input leaf: (microbatches, ...) where it is split, whole otherwise.
      replica: this device's index on the data axis.

    Returns:
      Outputs: stacked over microbatches if they are rows, else summed or taken once, zero on other
        devices than the
      one that makes them. Slots afterwards.
    """
    table = lower_schedule(forward_only(loop.num_devices, loop.num_microbatches, loop.num_chunks))
    device = LocalStage(loop, list(inputs), replica, gates=True)
    lanes = [wire_aval(lane.aval) for lane in loop.wiring.lanes]
    carry = (
        [fill(aval, loop.bubble_fill) for aval in lanes],
        empty_buffers(lanes, table.num_activation_slots, loop.bubble_fill),
        list(weights),
        [start_output(loop, p, role) for p, role in enumerate(roles)],
    )
    rows = {name: x for name, x in vars(table).items() if isinstance(x, np.ndarray)}
    (_, _, slots, outputs), _ = lax.scan(partial(_tick, device, roles), carry, rows)
    return outputs, slots


def _tick(
    device: LocalStage, roles: Sequence[str], carry: Carry, rows: dict[str, Any]
) -> tuple[Carry, None]:
    loop, (arrived, activations, slots, outputs) = device.loop, carry
    now = {name: row[device.index] for name, row in rows.items()}
    moment = MicrobatchContext(device, now["forward_microbatch"])
    activations = store(activations, now["activation_arrival"], arrived)
    chunk = jnp.clip(now["forward_chunk"], 0)
    branches = [
        partial(_run, device.of_chunk(c), moment, load(activations, now["activation_read"]), slots)
        for c in range(loop.num_chunks)
    ]
    made, state, new = lax.switch(chunk, branches)
    slots = list(slots)
    for j, x in zip(loop.state_slots, state, strict=True):
        slots[j] = from_wire(x, jax.typeof(slots[j]))
    sent = [
        device.send(x, lane.pairs(loop.num_devices), moment)
        for x, lane in zip(made, loop.wiring.lanes, strict=True)
    ]
    stage = chunk * loop.num_devices + device.index
    outputs = [
        add_output(role, so_far, x, moment, stage == output.stage)
        for role, so_far, x, output in zip(roles, outputs, new, loop.wiring.outputs, strict=True)
    ]
    return (sent, activations, slots, outputs), None


def _run(
    device: LocalStage, moment: MicrobatchContext, arrived: list[Any], slots: list[Any]
) -> tuple[list[Any], list[Any], list[Any]]:
    """What one of the device's stages sends, its new state, and its outputs, all as they are
    held.
    """
    results = device.run_stage(moment, arrived, slots)
    late = _run_after(device, moment, results, slots)
    made = [to_wire(results.made(lane.source)) for lane in device.wiring.lanes]
    sources = [output.source for output in device.wiring.outputs]
    outputs = [
        late[p] if p in late else to_wire(results.made(source)) for p, source in enumerate(sources)
    ]
    return made, [to_wire(results.slots[j]) for j in device.loop.state_slots], outputs


def _run_after(
    device: LocalStage, moment: MicrobatchContext, results: StageResults, slots: list[Any]
) -> dict[int, Any]:
    """Outputs of what follows the last stage's body; zeros on other stages."""
    piece, positions = segment_after_body(device)
    nothing = [fill(wire_aval(device.loop.output_aval(p)), 0.0) for p in positions]
    if piece.stage not in device.stages:
        return dict(zip(positions, nothing, strict=True))
    kept = moment.gate({x: results.made(source) for x, source in device.wiring.kept})
    known = {**device.known(moment, piece.stage, slots), **kept}

    def on_last() -> list[Any]:
        return [to_wire(x) for x in device.evaluate(piece.ops, known, piece.wanted, moment)]

    return dict(
        zip(positions, lax.cond(device.stage == piece.stage, on_last, lambda: nothing), strict=True)
    )
