"""Pinned and free operations of a program.

A pinned operation runs in exactly one stage. A free operation is recomputed in every stage that
needs its result: it reads weights only or inputs only (masks, casts, keys), and it is cheap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from layerwise_jax._jax import Literal
from layerwise_jax.trace.primitives import EXPENSIVE
from layerwise_jax.trace.program import (
    FROM_INPUTS,
    FROM_WEIGHTS,
    Program,
    Value,
    nbytes,
    source_flags,
)


def pinned_ops(program: Program) -> list[int]:
    """Positions of the operations that run in one stage only, in trace order.

    Pinned are operations that read both weights and inputs, expensive operations on inputs,
    operations with effects, and all operations that depend on a pinned one.
    """
    flags = source_flags(program)
    pinned: list[int] = []
    made: set[Value] = set()  # results of pinned operations
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
            pinned.append(i)
            made.update(op.results)
    return pinned


def live_bytes(program: Program, pinned: Sequence[int]) -> list[int]:
    """Bytes of the values alive at each of the len(pinned) + 1 boundaries of pinned operations.

    Alive is what an earlier pinned operation computes and a later one reads.
    """
    last_use: dict[Value, tuple[int, int]] = {}  # (position of producer, of last reader)
    for position, i in enumerate(pinned):
        last_use.update(dict.fromkeys(program.ops[i].results, (position, position)))
        for x in program.ops[i].values:
            if x in last_use:
                last_use[x] = (last_use[x][0], position)
    change = np.zeros(len(pinned) + 1, dtype=np.int64)  # bytes added at each boundary
    for x, (made, used) in last_use.items():
        if used > made:
            change[made + 1] += nbytes(program.avals[x])
            change[used + 1] -= nbytes(program.avals[x])
    return [int(width) for width in np.cumsum(change)]


def free_ops_behind(program: Program, operands: Sequence[Any], free: dict[Value, int]) -> set[int]:
    """Positions of the free operations that `operands` depend on.

    Args:
      program: the program.
      operands: values or literals.
      free: position of the free operation that computes each value.
    """
    found: set[int] = set()
    stack = [x for x in operands if not isinstance(x, Literal)]
    while stack:
        i = free.get(stack.pop())
        if i is not None and i not in found:
            found.add(i)
            stack.extend(program.ops[i].values)
    return found


def free_producers(program: Program, pinned: Sequence[int]) -> dict[Value, int]:
    """Position of the free operation that computes each value."""
    is_pinned = set(pinned)
    return {x: i for i, op in enumerate(program.ops) if i not in is_pinned for x in op.results}
