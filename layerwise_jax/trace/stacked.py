"""Layer slices of stacked arrays: recognises operations that stack values and that slice them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import jax
import jax.numpy as jnp

from layerwise_jax._jax import JaxprEqn, Literal, avals_of
from layerwise_jax.trace.program import Op, Operand, Value, Weight

Span = tuple[int, int]


class LayerSlices:
    """Stacked arrays of a program, with the value of each slice.

    A program that stacks new caches and slices them again then reads the values themselves.
    """

    def __init__(self) -> None:
        self._rows: dict[Value, tuple[Operand, ...]] = {}
        self._row_of: dict[Value, Operand] = {}

    def note(self, op: Op) -> None:
        """Record the operation if it stacks values along a new first axis.

        JAX 0.12 has a `stack` primitive; JAX 0.11 concatenates arrays of shape (1, ...).
        """
        if op.name == "stack" and op.eqn.params["axis"] == 0:
            self._rows[op.results[0]] = op.operands
        elif op.name == "broadcast_in_dim" and _adds_leading_axis(op.eqn):
            self._row_of[op.results[0]] = op.operands[0]
        elif op.name == "concatenate" and op.eqn.params["dimension"] == 0:
            rows = [self.row_in(x) for x in op.operands]
            if None not in rows:
                self._rows[op.results[0]] = tuple(row for row in rows if row is not None)
        elif op.name == "slice" and op.values and op.values[0] in self._rows:
            start, stop = (leading_spans(op.eqn) or [(0, 0)])[0]
            if stop == start + 1:
                self._row_of[op.results[0]] = self._rows[op.values[0]][start]

    def rows(self, operand: Operand) -> tuple[Operand, ...] | None:
        """Values of an array's slices along its first axis; None if it was not stacked here."""
        return None if isinstance(operand, Literal) else self._rows.get(operand)

    def row_in(self, operand: Operand) -> Operand | None:
        """Value of the one slice of an array of shape (1, ...); None if it is not known."""
        return None if isinstance(operand, Literal) else self._row_of.get(operand)


def leading_spans(eqn: JaxprEqn) -> list[Span] | None:
    """(start, stop) of every result along the first operand's first axis.

    None for equations that do anything else than slice the first axis.
    """
    name, params = eqn.primitive.name, eqn.params
    if name == "unstack" and params["axis"] == 0:
        return [(i, i + 1) for i in range(len(eqn.outvars))]
    if name == "split" and params["axis"] == 0:
        return list(pairwise(accumulate(params["sizes"], initial=0)))
    if name == "slice" and (
        params["strides"] is None or all(stride == 1 for stride in params["strides"])
    ):
        shape, start, stop = (
            avals_of(eqn.invars)[0].shape,
            params["start_indices"],
            params["limit_indices"],
        )
        is_whole = tuple(start[1:]) == (0,) * (len(shape) - 1) and tuple(stop[1:]) == tuple(
            shape[1:]
        )
        return [(start[0], stop[0])] if shape and is_whole else None
    return None


def _adds_leading_axis(eqn: JaxprEqn) -> bool:
    """True if a broadcast_in_dim only adds a leading axis of size 1."""
    shape = avals_of(eqn.invars)[0].shape
    axes = tuple(range(1, len(shape) + 1))
    return eqn.params["shape"] == (1, *shape) and eqn.params["broadcast_dimensions"] == axes


def are_disjoint(weights: Sequence[Weight]) -> bool:
    """True if the slices of a leaf do not overlap."""
    in_order = sorted(weights, key=lambda weight: weight.start or 0)
    return all(a.stop is not None and a.stop <= (b.start or 0) for a, b in pairwise(in_order))


def take_row(x: jax.Array, index: jax.Array) -> jax.Array:
    """The slice of an array at an index of its first axis."""
    row = jax.lax.dynamic_slice(x, (index, *[jnp.int32(0)] * (x.ndim - 1)), (1, *x.shape[1:]))
    return jax.lax.squeeze(row, (0,))


def gaps_between(spans: Sequence[Span], length: int) -> list[Span]:
    """The slices of an axis of `length` that no span covers; spans are in order."""
    stops = [0, *(stop for _, stop in spans)]
    starts = [*(start for start, _ in spans), length]
    return [(stop, start) for stop, start in zip(stops, starts, strict=True) if stop < start]
