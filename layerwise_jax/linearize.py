"""The pieces of a stage, each with its vjp: what precedes the body, the body, and what follows it.

A piece is a function of weights and of reads, what comes from the microbatch. Weights that are trained and reads that
are inexact have gradients; state has none, and counts as a read, since it changes with every microbatch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layerwise_jax.on_device import Moment, StageOnDevice
from layerwise_jax.program import Op, Operand, Value
from layerwise_jax.residuals import Residuals, StashLayout, find_residuals, share_buffers
from layerwise_jax.wiring import FromBody, FromBranch


@dataclass(frozen=True, eq=False)
class Piece:
    """Operations of one stage under the branch.

    Attributes:
      device: a device with the stage's chunk.
      stage: the stage.
      ops: the operations.
      wanted: their results that anything uses.
    """

    device: StageOnDevice
    stage: int
    ops: Sequence[Op]
    wanted: Sequence[Operand]

    def weights(self, slots: Sequence[Any]) -> dict[Value, Any]:
        """The weights that it uses, but for state."""
        return {x: slots[j] for x, j in self.slots().items() if j not in self.device.loop.state_slots}

    def state(self, slots: Sequence[Any]) -> dict[Value, Any]:
        """The state that it uses."""
        return {x: slots[j] for x, j in self.slots().items() if j in self.device.loop.state_slots}

    def slots(self) -> dict[Value, int]:
        """The slot of every weight that it uses."""
        used = {x for op in self.ops for x in op.values} | {x for x in self.wanted if isinstance(x, int)}
        slot_of = self.device.loop.placement.slot_of(self.stage)
        return {x: slot_of[weight] for x, weight in self.device.loop.stages[self.stage].weights.items() if x in used}

    def trained(self) -> dict[Value, int]:
        """The slot of every weight that has a gradient."""
        return {x: j for x, j in self.slots().items() if self.device.loop.has_gradient(j)}

    def linearize(
        self, moment: Moment, weights: Mapping[Value, Any], reads: Mapping[Value, Any]
    ) -> tuple[list[Any], Callable]:
        """Its results, and the vjp with respect to trained weights and inexact reads, by value."""
        known = {**self.device.given(moment, self.stage), **weights, **reads}
        state = self.state(range(len(self.device.loop.placement.slots)))
        moving = {x: known[x] for x in self.trained()}
        moving |= {x: v for x, v in reads.items() if is_inexact(v) and x not in state}
        run = self.device.evaluate
        return jax.vjp(lambda moving: run(self.ops, {**known, **moving}, self.wanted, moment), moving)


def before(device: StageOnDevice, s: int) -> tuple[Piece, list[int]]:
    """What stage s runs before its body, and which results of the branch that gives."""
    part = device.loop.alignment.parts[s]
    late = {x for op in part.after for x in op.results}
    values = [row[s] for _, row in device.wiring.branch_results]
    asked = [r for r, x in enumerate(values) if x is not None and x not in late]
    return Piece(device, s, part.before, [values[r] for r in asked]), asked  # type: ignore[misc]


def after(device: StageOnDevice) -> tuple[Piece, list[int]]:
    """What the last stage runs after its body, and the positions of the outputs that gives."""
    last = device.loop.num_stages - 1
    positions = [p for p, output in enumerate(device.wiring.outputs) if output.lag]
    wanted = [device.loop.stages[last].outputs[p] for p in positions]
    return Piece(device, last, device.loop.alignment.parts[last].after, wanted), positions


def linearize_body(
    device: StageOnDevice, moment: Moment, weights: Sequence[Any], reads: Sequence[Any]
) -> tuple[dict[int, Any], Callable]:
    """The body's results, and its vjp with respect to trained weights and inexact reads, by position."""
    values = [*weights, *reads]
    trained = [device.loop.has_gradient(j) for j in device.body_slots]
    moves = [*trained, *(is_inexact(x) for x in reads)]
    moving = {j: x for j, x in enumerate(values) if moves[j]}
    fixed = {j: x for j, x in enumerate(values) if not moves[j]}

    def run(moving: dict[int, Any]) -> dict[int, Any]:
        return device.run_body(moment, [x for _, x in sorted({**moving, **fixed}.items())])

    return jax.vjp(run, moving)


def lay_out_stash(device: StageOnDevice, slots: Sequence[Any]) -> StashLayout:
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


def stashed_sources(device: StageOnDevice) -> list[FromBody | FromBranch]:
    """The results that backward reads: what `after` reads, and outputs."""
    kept = [source for _, source in device.wiring.kept]
    return list(dict.fromkeys([*kept, *(output.source for output in device.wiring.outputs if not output.lag)]))


def result_aval(device: StageOnDevice, source: FromBody | FromBranch) -> Any:
    """The type of a result."""
    if isinstance(source, FromBranch):
        return device.wiring.branch_results[source.result][0]
    return device.program.avals[device.loop.alignment.parts[0].shape.made[source.result]]


def _own_residuals(device: StageOnDevice, s: int, slots: Sequence[Any]) -> Residuals:
    piece, _ = before(device, s)
    arrived = {x: type_of(device.program.avals[x]) for x in device.arriving(s)}

    def linearized(weights: Any, microbatch: Any) -> tuple[Any, Callable]:
        index, reads = microbatch
        return piece.linearize(Moment(device, index), weights, reads)

    weights = piece.weights(slots)
    return find_residuals(linearized, weights, (jax.ShapeDtypeStruct((), jnp.int32), {**arrived, **piece.state(slots)}))


def _body_residuals(device: StageOnDevice, slots: Sequence[Any]) -> Residuals:
    shape = device.loop.alignment.parts[0].shape
    reads = [type_of(device.program.avals[x]) for x in shape.reads]

    def linearized(weights: Any, microbatch: Any) -> tuple[Any, Callable]:
        index, reads = microbatch
        return linearize_body(device, Moment(device, index), weights, reads)

    weights = [slots[j] for j in device.body_slots]
    return find_residuals(linearized, weights, (jax.ShapeDtypeStruct((), jnp.int32), reads))


def type_of(aval: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype alone."""
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def is_inexact(x: Any) -> bool:
    """Whether an array, or a type, can have a gradient."""
    return jnp.issubdtype(x.dtype, jnp.inexact)


def cotangent(aval: Any, gradient: Any) -> Any:
    """A gradient as a vjp takes it: zeros where there is none, float0 for what has none."""
    if not is_inexact(aval):
        return np.zeros(aval.shape, jax.dtypes.float0)
    return jnp.zeros(aval.shape, aval.dtype) if gradient is None else gradient.astype(aval.dtype)
