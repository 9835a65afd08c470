"""The pieces of a stage, each with its vjp: what precedes the body, the body, and what follows it.

A piece is a function of weights and of reads, what comes from the microbatch. Weights that are
trained and reads that are inexact have gradients; state has none, and counts as a read, since it
changes with every microbatch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from layerwise_jax.run.residuals import Residuals, StashLayout, find_residuals, share_buffers
from layerwise_jax.run.segment import segment_before_body
from layerwise_jax.run.stage import LocalStage, MicrobatchContext
from layerwise_jax.stage.wiring import FromBody, FromBranch
from layerwise_jax.trace.derivative import is_inexact, type_of


def linearize_body(
    device: LocalStage, moment: MicrobatchContext, weights: Sequence[Any], reads: Sequence[Any]
) -> tuple[dict[int, Any], Callable]:
    """The body's results, and its vjp with respect to trained weights and inexact reads, by
    position.
    """
    values = [*weights, *reads]
    trained = [device.loop.has_gradient(j) for j in device.body_slots]
    moves = [*trained, *(is_inexact(x) for x in reads)]
    moving = {j: x for j, x in enumerate(values) if moves[j]}
    fixed = {j: x for j, x in enumerate(values) if not moves[j]}

    def run(moving: dict[int, Any]) -> dict[int, Any]:
        return device.run_body(moment, [x for _, x in sorted({**moving, **fixed}.items())])

    return jax.vjp(run, moving)


def lay_out_stash(device: LocalStage, slots: Sequence[Any]) -> StashLayout:
    """Buffers for what the vjps of all stages keep.

    Args:
      device: any chunk of the device.
      slots: its row of every slot.
    """
    chunks = [device.of_chunk(c) for c in range(device.loop.num_chunks)]
    own = {s: _own_residuals(chunk, s, slots) for chunk in chunks for s in chunk.stages}
    places, own_avals = share_buffers(own)
    body = _body_residuals(device, slots) if device.loop.has_body else None
    results = tuple(result_aval(device, source) for source in stashed_sources(device))
    return StashLayout(results, body, own, places, own_avals)


def stashed_sources(device: LocalStage) -> list[FromBody | FromBranch]:
    """The results that backward reads: what `after` reads, and outputs."""
    kept = [source for _, source in device.wiring.kept]
    return list(
        dict.fromkeys(
            [*kept, *(output.source for output in device.wiring.outputs if not output.lag)]
        )
    )


def result_aval(device: LocalStage, source: FromBody | FromBranch) -> Any:
    """The type of a result."""
    if isinstance(source, FromBranch):
        return device.wiring.branch_results[source.result][0]
    return device.program.avals[device.loop.alignment.parts[0].shape.made[source.result]]


def _own_residuals(device: LocalStage, s: int, slots: Sequence[Any]) -> Residuals:
    piece, _ = segment_before_body(device, s)
    arrived = {x: type_of(device.program.avals[x]) for x in device.arriving(s)}

    def linearized(weights: Any, microbatch: Any) -> tuple[Any, Callable]:
        index, reads = microbatch
        return piece.linearize(MicrobatchContext(device, index), weights, reads)

    weights = piece.weights(slots)
    return find_residuals(
        linearized,
        weights,
        (jax.ShapeDtypeStruct((), jnp.int32), {**arrived, **piece.state(slots)}),
    )


def _body_residuals(device: LocalStage, slots: Sequence[Any]) -> Residuals:
    shape = device.loop.alignment.parts[0].shape
    reads = [type_of(device.program.avals[x]) for x in shape.reads]

    def linearized(weights: Any, microbatch: Any) -> tuple[Any, Callable]:
        index, reads = microbatch
        return linearize_body(device, MicrobatchContext(device, index), weights, reads)

    weights = [slots[j] for j in device.body_slots]
    return find_residuals(linearized, weights, (jax.ShapeDtypeStruct((), jnp.int32), reads))
