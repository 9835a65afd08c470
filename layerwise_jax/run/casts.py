"""Casts of weights: made once a step, before the tick loop, instead of once a microbatch.

Mixed precision keeps float32 weights and computes with a cast of them. Where the only op that reads
a weight is such a cast, for all weights of a slot, the loop gets the slot cast already, and the ops
read it in place of the cast's result.

Gradients are unchanged, bit for bit: the transpose of the cast converts a microbatch's gradient to
the accumulator's dtype, and so does the accumulation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

from layerwise_jax.stage.align import TracedBody
from layerwise_jax.stage.staged_program import StagedProgram
from layerwise_jax.trace.program import Op, Operand, Value, Weight


@dataclass(frozen=True, eq=False)
class CastProgram:
    """A staged program whose ops read some slots cast.

    Attributes:
      program: the program, without the casts.
      dtypes: the dtype of every slot that is cast before the loop.
    """

    program: StagedProgram
    dtypes: Mapping[int, Any]

    def cast(self, weights: Sequence[Any]) -> list[Any]:
        """The weights by slot, as the program reads them."""
        return [w.astype(self.dtypes[j]) if j in self.dtypes else w for j, w in enumerate(weights)]


def take_casts_out(program: StagedProgram) -> CastProgram:
    """Find the slots that can be cast before the loop, and take the casts out of the ops."""
    if not isinstance(program.alignment.body, TracedBody):
        return CastProgram(program, {})  # a kernel in its place takes weights in their own dtype
    casts = _only_casts(program)
    dtypes = _cast_slots(program, casts)
    # result of a cast -> weight
    removed = {
        casts[weight].results[0]: casts[weight].values[0]
        for j in dtypes
        for weight in program.placement.slots[j].weights
        if weight is not None
    }
    return CastProgram(_without(program, removed), dtypes)


def _cast_slots(program: StagedProgram, casts: Mapping[Weight, Op]) -> dict[int, Any]:
    """The slots all of whose weights are cast to one dtype, and that dtype."""
    slots = program.placement.slots
    dtypes: dict[int, Any] = {}
    for j, slot in enumerate(slots):
        held = [weight for weight in slot.weights if weight is not None]
        # One dtype for all devices: a slot is one array.
        found = {_dtype_of(casts[weight]) if weight in casts else None for weight in held}
        if len(found) == 1 and None not in found and j not in program.state_slots:
            (dtypes[j],) = found
    # A weight with copies in several slots is cast in all of them or in none; a slot that drops
    # out for that may take others with it.
    places = [{j for j, _ in copies} for copies in program.placement.copies().values()]
    while mixed := [
        each & dtypes.keys() for each in places if 0 < len(each & dtypes.keys()) < len(each)
    ]:
        for each in mixed:
            for j in each:
                dtypes.pop(j, None)
    return dtypes


def _only_casts(program: StagedProgram) -> dict[Weight, Op]:
    """The cast to a narrower dtype that is the only reader of a weight, by weight."""
    flat = program.program
    readers: dict[Value, list[Op]] = {}
    for op in flat.ops:
        for x in op.values:
            readers.setdefault(x, []).append(op)
    num_values = Counter(flat.weights.values())
    # Values that must be there under their own name: outputs, and what crosses between stages.
    named = {*flat.outputs, *(x for stage in program.stages for x in stage.sends)}
    named.update(x for _, operands in program.wiring.branch_results for x in operands)
    found = {}
    for value, weight in flat.weights.items():
        # With two readers, their gradients would be added in the narrow dtype.
        ops = readers.get(value, [])
        if num_values[weight] != 1 or len(ops) != 1 or value in named:
            continue
        if _is_narrowing(ops[0], flat.avals[value].dtype) and ops[0].results[0] not in named:
            found[weight] = ops[0]
    return found


def _is_narrowing(op: Op, dtype: Any) -> bool:
    """True for a cast of floating-point values of `dtype` to a narrower floating-point dtype."""
    if op.name != "convert_element_type":
        return False
    new = _dtype_of(op)
    is_floating = all(jnp.issubdtype(each, jnp.floating) for each in (new, dtype))
    return is_floating and new.itemsize < jnp.dtype(dtype).itemsize


def _dtype_of(op: Op) -> Any:
    return jnp.dtype(op.eqn.params["new_dtype"])


def _without(program: StagedProgram, removed: Mapping[Value, Value]) -> StagedProgram:
    """The program with the results of removed casts replaced by their weights."""

    def renamed(operand: Operand) -> Operand:
        return removed.get(operand, operand) if isinstance(operand, int) else operand

    def rest(ops: Sequence[Op]) -> tuple[Op, ...]:
        return tuple(
            replace(op, operands=tuple(map(renamed, op.operands)))
            for op in ops
            if not op.results or op.results[0] not in removed
        )

    alignment = program.alignment
    body = alignment.body
    assert isinstance(body, TracedBody)
    parts = tuple(
        replace(part, before=rest(part.before), body=rest(part.body), after=rest(part.after))
        for part in alignment.parts
    )
    return replace(
        program, alignment=replace(alignment, parts=parts, body=replace(body, ops=rest(body.ops)))
    )
