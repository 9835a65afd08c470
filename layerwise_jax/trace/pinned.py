"""Which operations of a program have a place of their own, and which go with whatever uses them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from layerwise_jax._jax import Literal
from layerwise_jax.trace.flatten import FROM_INPUTS, FROM_WEIGHTS, source_flags
from layerwise_jax.trace.primitives import EXPENSIVE
from layerwise_jax.trace.program import Program, Value, nbytes


def pinned_ops(program: Program) -> list[int]:
    """Positions of the operations that stay where the trace put them; all others go with their
    users.

    Anchored is what meets both parameters and data, what is too costly to repeat, what has an
    effect, and what depends on any of these.
    """
    flags = source_flags(program)
    anchored, made = [], set()
    for i, op in enumerate(program.ops):
        flag = 0
        for x in op.values:
            flag |= flags[x]
        costly = flag & FROM_INPUTS and op.name in EXPENSIVE
        if (
            flag == FROM_INPUTS | FROM_WEIGHTS
            or costly
            or op.eqn.effects
            or made.intersection(op.values)
        ):
            anchored.append(i)
            made.update(op.results)
    return anchored


def live_bytes(program: Program, anchors: Sequence[int]) -> list[int]:
    """Bytes alive before each anchored operation, and after the last: values made by one and used
    by a later one.
    """
    last_use: dict[Value, tuple[int, int]] = {}
    for position, i in enumerate(anchors):
        last_use.update(dict.fromkeys(program.ops[i].results, (position, position)))
        for x in program.ops[i].values:
            if x in last_use:
                last_use[x] = (last_use[x][0], position)
    change = np.zeros(len(anchors) + 1, dtype=np.int64)
    for x, (made, used) in last_use.items():
        if used > made:
            change[made + 1] += nbytes(program.avals[x])
            change[used + 1] -= nbytes(program.avals[x])
    return [int(width) for width in np.cumsum(change)]


def free_ops_behind(program: Program, operands: Sequence[Any], free: dict[Value, int]) -> set[int]:
    """Positions of the unanchored operations that `operands` depend on.

    Args:
      program: the program.
      operands: values or literals.
      free: the position of the unanchored operation that makes each value.
    """
    found: set[int] = set()
    stack = [x for x in operands if not isinstance(x, Literal)]
    while stack:
        i = free.get(stack.pop())
        if i is not None and i not in found:
            found.add(i)
            stack.extend(program.ops[i].values)
    return found


def free_producers(program: Program, anchors: Sequence[int]) -> dict[Value, int]:
    """The position of the unanchored operation that makes each value."""
    anchored = set(anchors)
    return {x: i for i, op in enumerate(program.ops) if i not in anchored for x in op.results}
