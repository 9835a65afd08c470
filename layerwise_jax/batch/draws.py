"""Roles through operations that draw by shape (iotas, random bits, keys), and through the numbers
of rows they make.

What is drawn for the full batch cannot be drawn for a part alone: the first row of the second part
is not the first row of the batch. An operation in the program proper is run at the full batch and
its rows are sliced out; in the body of a loop or branch that cannot be asked for.
"""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp

from layerwise_jax.batch import elementwise, shapes
from layerwise_jax.batch.elementwise import common_axis
from layerwise_jax.batch.lattice import (
    BatchIota,
    IndexColumns,
    NotSeparableError,
    OpContext,
    PartialSum,
    Replicated,
    Role,
    Split,
    build,
    known,
    one_scaling_axis,
    scaling_axes,
)
from layerwise_jax.batch.linearity import nonlinear
from layerwise_jax.trace.program import FullRows

HIDDEN = (
    "draws by the shape of the batch in the body of a loop, branch or custom derivative, where a "
    "part cannot be given "
    "its share of what the full batch draws; draw outside of it, or with a key for each example"
)


class Draws:
    """What the walk over a program has found out about its drawing operations.

    Attributes:
      full_rows: by position in the program, the operations to run at the full batch.
    """

    def __init__(self) -> None:
        self.full_rows: dict[int, FullRows] = {}
        self._iotas: dict[int, FullRows] = {}
        self._indexing: set[int] = set()

    def draw(self, step: OpContext, position: int | None) -> Role:
        """Of an operation that draws by shape. `position` is None in the body of a loop or
        branch.
        """
        axis = step.axis() if step.roles else None
        drawn = one_scaling_axis(*step.result_shapes())
        if step.name == "iota":
            return self._iota(step, position)
        nonlinear(step)
        if isinstance(step.roles[0], Split) or drawn is None or drawn == axis:
            return build(common_axis(step), 1.0, False)
        if position is None:
            raise NotSeparableError(HIDDEN, "draw")
        self.full_rows[position] = FullRows(step.full, drawn)
        return Split(drawn)

    def _iota(self, step: OpContext, position: int | None) -> Role:
        axis = step.params["dimension"]
        if axis not in scaling_axes(*step.result_shapes()):
            return Replicated()
        length = step.result_shapes()[0][axis]
        if position is None:
            return BatchIota(axis, length, None)
        self._iotas[position] = FullRows(step.full, axis)
        return BatchIota(axis, length, frozenset([position]))

    def index_by(self, role: Role) -> None:
        """Note that numbers of rows index the rows of a part."""
        for numbers in role.columns if isinstance(role, IndexColumns) else [role]:
            if isinstance(numbers, BatchIota):
                self._indexing |= numbers.sources or frozenset()
        self._check()

    def as_rows(self, role: Role) -> Role:
        """Numbers of rows as data of the examples: they are then those of the full batch."""
        if isinstance(role, IndexColumns):
            for column in role.columns:
                self.as_rows(column)
            return Split(role.axis)
        if not isinstance(role, BatchIota):
            return role
        if role.sources is None:
            raise NotSeparableError(HIDDEN, "draw")
        if role.offset[0] != role.offset[1]:
            raise NotSeparableError(
                "counts the examples from a place that depends on the length of the batch", "size"
            )
        self.full_rows.update({source: self._iotas[source] for source in role.sources})
        self._check()
        return Split(role.axis)

    def _check(self) -> None:
        if self._indexing.intersection(self.full_rows):
            raise NotSeparableError(
                "uses the same numbers of the examples (an arange) both as their index and as "
                "data; make two of them",
                "draw",
            )


def numbers_through(step: OpContext) -> Role | None:
    """The role of a result that still counts rows, or is settled by their being counts; None if it
    is not.
    """
    role = step.roles[0]
    if step.name == "concatenate":
        return _columns(step)
    if not isinstance(role, BatchIota):
        return None
    fill = (
        step.roles[1].fill
        if len(step.roles) == 2 and isinstance(step.roles[1], Replicated)
        else None
    )
    if step.name in ("add", "sub") and fill:
        sign = 1 if step.name == "add" else -1
        return replace(
            role,
            offset=(role.offset[0] + sign * int(fill[0]), role.offset[1] + sign * int(fill[1])),
        )
    if step.name == "lt" and fill and fill[0] == fill[1] and min(role.offset) >= fill[0]:
        return known(False, False)
    if step.name in _MOVES and _holds(step, step.parts * role.length + max(role.offset)):
        moved = _MOVES[step.name](step.with_roles([Split(role.axis)]))
        assert isinstance(moved, Split)
        return replace(role, axis=moved.axis)
    return None


_MOVES = {
    **{
        name: shapes.RULES[name]
        for name in ("broadcast_in_dim", "reshape", "squeeze", "expand_dims")
    },
    **{name: elementwise.RULES[name] for name in ("convert_element_type", "copy")},
}


def _holds(step: OpContext, count: int) -> bool:
    """Whether the result can hold integers up to `count`."""
    dtype = step.dtypes[1]
    return jnp.issubdtype(dtype, jnp.integer) and count <= jnp.iinfo(dtype).max


def _columns(step: OpContext) -> Role | None:
    """Index vectors put together from columns."""
    last = len(step.shape()) - 1
    widths = [step.shape(i)[last] for i in range(len(step.roles))]
    axes = {step.axis(i) for i in range(len(step.roles))}
    if step.params["dimension"] != last or widths != [1] * len(widths) or len(axes) > 1:
        return None
    if any(isinstance(role, PartialSum | IndexColumns) for role in step.roles):
        return None
    return IndexColumns(axes.pop() or 0, step.roles)
