"""What only renews state stands where its layer is, not where the trace had it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from layerwise_jax._jax import Literal
from layerwise_jax.program import Program, Value


def renew_early(program: Program, state_outputs: Collection[int]) -> Program:
    """The program with every operation that feeds nothing but state as early as its operands allow.

    A step may round or stack all layers' caches at its end; each layer's part belongs to that layer's stage.

    Args:
      program: the program.
      state_outputs: positions of the outputs that are the next state.
    """
    needed = _needed_elsewhere(program, state_outputs)
    made: dict[Value, int] = {}
    order = []
    for i, op in enumerate(program.ops):
        is_early = not op.eqn.effects and not needed.intersection(op.results)
        position = max((made.get(x, -1) for x in op.values), default=-1) if is_early else i
        order.append((position, i))
        made.update(dict.fromkeys(op.results, position))
    return replace(program, ops=tuple(program.ops[i] for _, i in sorted(order)))


def _needed_elsewhere(program: Program, state_outputs: Collection[int]) -> set[Value]:
    """The values that something else than the next state comes from."""
    needed = {x for p, x in enumerate(program.outputs) if p not in state_outputs and not isinstance(x, Literal)}
    for op in reversed(program.ops):
        if op.eqn.effects or needed.intersection(op.results):
            needed.update(op.values)
    return needed
