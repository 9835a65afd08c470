"""Random draws, iotas, and the numbering of examples that iotas make.

A draw by shape makes as many numbers as its result has entries, from one key. Drawn for a part it
would give the part the numbers of the first examples, so an operation of the program is run at the
full batch and the part's rows are sliced out. In the body of a loop or branch that is impossible
and the draw is refused.
"""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp

from layerwise_jax import _jax
from layerwise_jax.batch.lattice import (
    BatchIota,
    IndexColumns,
    NotSeparableError,
    OpContext,
    PartialSum,
    Parts,
    Replicated,
    Role,
    Split,
    build,
    known,
    one_scaling_axis,
    scaling_axes,
)
from layerwise_jax.batch.linearity import nonlinear
from layerwise_jax.batch.rules import elementwise, shapes
from layerwise_jax.batch.rules.elementwise import common_axis
from layerwise_jax.trace.program import FullRows

PRIMITIVES = frozenset("iota random_bits random_split random_fold_in random_gamma".split())
"""Primitives that draw by shape or depend on the implementation of their keys."""

# For each key implementation, the operations that use every key of an array of keys by itself. The
# others read the first key of the array: `lax.rng_bit_generator`, batched, draws for all from it.
PER_KEY = {
    "threefry2x32": PRIMITIVES - {"iota"},
    "rbg": frozenset({"random_split", "random_fold_in", "random_gamma"}),
}

HIDDEN = (
    "draws by the shape of the batch in the body of a loop, branch or custom derivative, where a "
    "part cannot be given its share of the full batch's draw; draw outside of it, or with one key "
    "for each example"
)


class Draws:
    """Drawing operations found by one run of the interpreter.

    Attributes:
      full_rows: by position in the program, the operations to run at the full batch.
      per_part: positions of iotas that number the examples of each part from 0.
      accepts_per_part: whether an iota in the body of a loop may number those of each part.
    """

    def __init__(
        self, per_part: frozenset[int] = frozenset(), accepts_per_part: bool = False
    ) -> None:
        self.full_rows: dict[int, FullRows] = {}
        self.per_part = per_part
        self.accepts_per_part = accepts_per_part
        self._iotas: dict[int, FullRows] = {}
        self._indexing: set[int] = set()

    @property
    def numbered(self) -> frozenset[int]:
        """Positions of the iotas that number the full batch and are read as data."""
        return frozenset(self.full_rows) & frozenset(self._iotas)

    def draw(self, step: OpContext, position: int | None) -> Role:
        """Role of a draw; `position` is None in the body of a loop or branch."""
        if step.name == "iota":
            return self._iota(step, position)
        nonlinear(step)
        # Axis of the result that is as long as the batch: bits [..., examples, ...].
        drawn = one_scaling_axis(*step.result_shapes())
        if drawn is None:  # the same draw for every part
            return build(common_axis(step), 1.0, False)
        # Keys [examples]: each draws its own, if its implementation lets it.
        follows_keys = step.name == "random_fold_in" or step.axis(0) is not None
        if follows_keys and step.name in PER_KEY.get(_implementation(step), ()):
            return build(common_axis(step), 1.0, False)
        if follows_keys and any(isinstance(role, Split) for role in step.roles[:2]):
            raise NotSeparableError(
                "draws with the first key of the batch for all examples, as keys of the "
                f"implementation '{_implementation(step)}' do under vmap; use threefry2x32 keys, "
                "or draw in one call with one key"
            )
        # One key for the batch: drawn at the full batch, rows sliced out.
        if position is None:
            raise NotSeparableError(HIDDEN, "draw")
        # A part draws [batch] with the same key and takes its rows: bits equal the unstaged run's.
        self.full_rows[position] = FullRows(step.full, drawn)
        return Split(drawn)

    def _iota(self, step: OpContext, position: int | None) -> Role:
        axis = step.params["dimension"]
        # An arange over features is the same in both traces.
        if axis not in scaling_axes(*step.result_shapes()):
            return Replicated()
        length = step.result_shapes()[0][axis]  # rows of a part
        if position is None:
            return BatchIota(axis, length, None)
        self._iotas[position] = FullRows(step.full, axis)
        return BatchIota(axis, length, frozenset([position]))

    def index_by(self, role: Role) -> None:
        """Note that a numbering of the examples indexes the examples of a part."""
        for numbers in role.columns if isinstance(role, IndexColumns) else [role]:
            if isinstance(numbers, BatchIota):
                self._indexing |= numbers.sources or frozenset()
        self._check()

    def as_rows(self, role: Role) -> Role:
        """Role of a numbering that is read as data: each example's number in the full batch.

        Raises:
          NotSeparableError: the numbers are those of each part, or no slice of the full batch's.
        """
        if isinstance(role, IndexColumns):
            for column in role.columns:
                self.as_rows(column)
            return Split(role.axis)
        if not isinstance(role, BatchIota):
            return role
        if role.sources is None and not self.accepts_per_part:
            raise NotSeparableError(HIDDEN, "draw")
        if role.sources is None or role.sources & self.per_part:
            raise NotSeparableError("numbers the examples of each part from 0")
        # arange(b) - b: numbers that count back from the end differ between the traces.
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
                "uses one numbering of the examples (an arange) both as their index and as data; "
                "make two of them",
                "draw",
            )


def _implementation(step: OpContext) -> str:
    """Name of the implementation of the keys that an operation reads."""
    return _jax.key_implementation(step.micro.invars[0].aval)


def numbers_through(step: OpContext) -> Role | None:
    """Role of a result that still numbers the examples or follows from their range, else None."""
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
    # JAX tests i < 0 before it adds the length to a negative index; here it is never true.
    if step.name == "lt" and fill and fill[0] == fill[1] and min(role.offset) >= fill[0]:
        return known(False, False)
    if step.name in _MOVES and _holds(step, step.parts * role.length + max(role.offset)):
        # Reuse the rule for rows to find the axis, then keep the numbering.
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


def _holds(step: OpContext, count: Parts) -> bool:
    """True if the result's dtype holds integers up to `count`."""
    dtype = step.dtypes[1]
    return jnp.issubdtype(dtype, jnp.integer) and count <= jnp.iinfo(dtype).max


def _columns(step: OpContext) -> Role | None:
    """Role of index vectors [..., columns] concatenated from columns [..., 1]."""
    last = len(step.shape()) - 1
    widths = [step.shape(i)[last] for i in range(len(step.roles))]
    axes = {step.axis(i) for i in range(len(step.roles))}
    if step.params["dimension"] != last or widths != [1] * len(widths) or len(axes) > 1:
        return None
    if any(isinstance(role, PartialSum | IndexColumns) for role in step.roles):
        return None
    return IndexColumns(axes.pop() or 0, step.roles)
