"""Order of a step's operations: cache updates move to the layer whose state they renew."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from layerwise_jax.trace.program import Program, Value, without_dead_code


def renew_early(program: Program, state_outputs: Collection[int]) -> Program:
    """The program with every operation that feeds only state as early as its operands allow.

    A step may round or stack all layers' caches at its end; each layer's part belongs to that
    layer's stage.

    Args:
      program: the program.
      state_outputs: positions of the outputs that are the next state.
    """
    results = [x for p, x in enumerate(program.outputs) if p not in state_outputs]
    needed = set(without_dead_code(program.ops, results))
    made: dict[Value, int] = {}  # position of the operation that makes a value
    order = []
    for i, op in enumerate(program.ops):
        # An operation that feeds only state goes right behind its last operand.
        position = i if op in needed else max((made.get(x, -1) for x in op.values), default=-1)
        order.append((position, i))
        made.update(dict.fromkeys(op.results, position))
    return replace(program, ops=tuple(program.ops[i] for _, i in sorted(order)))
