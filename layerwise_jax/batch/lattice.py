"""What a value is to the batch: the roles that the analysis of microbatching gives to values.

A function is looked at in two traces, one of a part of the batch and one of the full batch (`parts`
times as long). The role of a value says how its full form follows from its forms in the parts. Each
role has a `ratio`, the factor between the two that comes from numbers such as 1 / batch_size which
differ between the traces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isclose
from typing import Any, Literal

import numpy as np

from layerwise_jax._jax import JaxprEqn, source_line

RATIO_TOLERANCE = 1e-5
"""Relative: above float32 rounding, far below the step from one number of parts to the next."""


@dataclass(frozen=True)
class Replicated:
    """The same for every part, and constant along an axis whose length follows the batch: full =
    ratio * part.

    Attributes:
      ratio: the factor between the traces.
      fill: the number that every entry is, in the part's trace and in the full one, where it is
        known.
    """

    ratio: float = 1.0
    fill: tuple[Any, Any] | None = None

    @property
    def is_zero(self) -> bool:
        return self.fill is not None and self.fill[0] == 0 and self.fill[1] == 0


@dataclass(frozen=True)
class Split:
    """Along `axis` each example has its own equal block: full = ratio * the parts, one after the
    other.
    """

    axis: int
    ratio: float = 1.0


@dataclass(frozen=True)
class PartialSum:
    """Linear in a sum over examples: full = ratio * the sum of the parts. 1 is a sum, 1 / parts is
    a mean.
    """

    ratio: float


@dataclass(frozen=True)
class BatchIota:
    """Along `axis` counts the `length` rows of a part: an iota, plus an offset that may differ
    between the traces.

    As the index of a row's own entry it means the same in a part; as a number it does not, unless
    the operations that made it (`sources`, by position in the program; None inside a loop or
    branch) are run at the full batch.
    """

    axis: int
    length: int
    sources: frozenset[int] | None
    offset: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class IndexColumns:
    """Index vectors for a gather or scatter, column by column along the last axis; some columns
    count the rows.
    """

    axis: int
    columns: tuple[Role, ...]


Cause = Literal["statistics", "unknown", "size", "draw", "derivative"]


@dataclass(frozen=True)
class NotSeparable:
    """No parts combine to it.

    Attributes:
      cause: "statistics" where examples meet, "unknown" where they may, "size" where the length of
        the batch enters, "draw" where random or row numbers are drawn by shape in a place where
        they cannot be drawn for the full batch.
      why: what the operation does, to be read after its name.
      eqn: the operation; None for an input or constant.
      after: the line of the user's code that made the operations before it, where its own is not
        known.
    """

    cause: Cause
    why: str
    eqn: JaxprEqn | None = None
    after: str = ""

    @property
    def is_excusable(self) -> bool:
        """Whether it comes only of statistics that may be asked for."""
        return self.cause in ("statistics", "unknown")

    def __str__(self) -> str:
        return f"{described(self.eqn, self.after) if self.eqn else 'the function'} {self.why}"


Role = Replicated | Split | PartialSum | BatchIota | IndexColumns | NotSeparable


class NotSeparableError(Exception):
    """Raised by a rule: the result of its operation is `Mixed`."""

    def __init__(self, why: str, cause: Cause = "statistics"):
        super().__init__(why)
        self.cause: Cause = cause


def described(eqn: JaxprEqn, after: str = "") -> str:
    """An operation and the line of the user's code that made it, or those before it where JAX does
    not know.
    """
    line = source_line(eqn)
    inside = f"inside of JAX, after {after}" if after else "inside of JAX"
    return f"{eqn.primitive.name} at {line}" if line else f"{eqn.primitive.name} ({inside})"


SIZE = "uses the length of the batch in a way that is not a plain factor of its result"


@dataclass(frozen=True)
class OpContext:
    """One operation, in both traces, with the roles of its operands."""

    micro: JaxprEqn
    full: JaxprEqn
    roles: tuple[Role, ...]
    parts: int

    @property
    def name(self) -> str:
        return self.micro.primitive.name

    @property
    def params(self) -> dict[str, Any]:
        return self.micro.params

    def shape(self, operand: int = 0) -> tuple[int, ...]:
        """The shape of an operand in a part."""
        return _aval(self.micro.invars[operand]).shape

    def full_shape(self, operand: int = 0) -> tuple[int, ...]:
        return _aval(self.full.invars[operand]).shape

    def result_shapes(self, result: int = 0) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of a result in a part and in the full batch."""
        return _aval(self.micro.outvars[result]).shape, _aval(self.full.outvars[result]).shape

    @property
    def dtypes(self) -> tuple[Any, Any]:
        """The types of the first operand's entries and of the first result's."""
        return _aval(self.micro.invars[0]).dtype, _aval(self.micro.outvars[0]).dtype

    def axis(self, operand: int = 0) -> int | None:
        """The axis along which an operand has a block for each example, if it has one."""
        role = self.roles[operand]
        if isinstance(role, Split | BatchIota | IndexColumns):
            return role.axis
        return one_scaling_axis(self.shape(operand), self.full_shape(operand))

    def has_rows(self, operand: int) -> bool:
        return isinstance(self.roles[operand], Split)

    def with_roles(self, roles: Sequence[Role]) -> OpContext:
        return replace(self, roles=tuple(roles))


def _aval(atom: Any) -> Any:
    return atom.aval


def scaling_axes(micro: Sequence[int], full: Sequence[int]) -> tuple[int, ...]:
    """The axes whose lengths follow the batch."""
    return tuple(i for i, (m, f) in enumerate(zip(micro, full, strict=True)) if m != f)


def one_scaling_axis(micro: Sequence[int], full: Sequence[int]) -> int | None:
    """The axis whose length follows the batch, if any.

    Raises:
      Mixes: there are two.
    """
    axes = scaling_axes(micro, full)
    if len(axes) > 1:
        raise NotSeparableError(
            "works on an array with a row and a column for each example, which pairs examples"
        )
    return axes[0] if axes else None


def same(a: float, b: float) -> bool:
    """Whether two ratios are equal but for the rounding of literals."""
    return isclose(a, b, rel_tol=RATIO_TOLERANCE)


def known(micro: Any, full: Any) -> Replicated:
    """A number that is known in both traces."""
    if micro == full or (micro != micro and full != full):
        return Replicated(1.0, (micro, full))
    has_ratio = micro and full and np.isrealobj(micro)
    return Replicated(float(full) / float(micro) if has_ratio else float("nan"), (micro, full))


def build(axis: int | None, ratio: float, summed: bool) -> Role:
    """The role of a result, from where its batch is and how it scales."""
    if summed:
        return PartialSum(ratio)
    return Replicated(ratio) if axis is None else Split(axis, ratio)


def checked(role: Role, micro: tuple[int, ...], full: tuple[int, ...], parts: int) -> Role:
    """The role of a result, if its shapes in the two traces bear it out.

    Raises:
      Mixes: they do not.
    """
    axes = scaling_axes(micro, full)
    if any(full[i] != parts * micro[i] for i in axes):
        raise NotSeparableError(
            f"makes an array of {list(micro)} of a part and {list(full)} of the full batch", "size"
        )
    if isinstance(role, PartialSum) and axes:
        raise NotSeparableError(
            "gives every example a sum or mean over all examples (as batch normalisation in "
            "training does)"
        )
    if isinstance(role, Split | BatchIota | IndexColumns) and (
        set(axes) - {role.axis} or full[role.axis] % parts
    ):
        raise NotSeparableError(
            "makes an array with a row and a column for each example, which pairs examples"
        )
    if (
        isinstance(role, Split | BatchIota | IndexColumns)
        and full[role.axis] != parts * micro[role.axis]
    ):
        raise NotSeparableError(
            "makes something of each example that is not as long as the batch", "size"
        )
    return role


def joined(a: Role, b: Role, parts: int) -> Role:
    """The role of a value that is one or the other, by a branch or from one iteration to the
    next.
    """
    if a == b or isinstance(a, NotSeparable):
        return a
    if isinstance(b, NotSeparable):
        return b
    if isinstance(a, Replicated) and isinstance(b, Replicated):
        return Replicated(a.ratio) if same(a.ratio, b.ratio) else NotSeparable("size", SIZE)
    if isinstance(b, Replicated):
        a, b = b, a
    if isinstance(a, Replicated) and isinstance(b, PartialSum):
        fits = a.is_zero or same(a.ratio / parts, b.ratio)
        return (
            b
            if fits
            else NotSeparable(
                "statistics", "may be a sum over examples or not, as a branch or loop goes"
            )
        )
    if isinstance(a, Replicated) and isinstance(b, Split) and (a.is_zero or same(a.ratio, b.ratio)):
        return b
    if isinstance(a, PartialSum) and isinstance(b, PartialSum) and same(a.ratio, b.ratio):
        return a
    if (
        isinstance(a, Split)
        and isinstance(b, Split)
        and a.axis == b.axis
        and same(a.ratio, b.ratio)
    ):
        return a
    return NotSeparable(
        "statistics",
        "has the examples along one axis or another, or a sum of them, as a branch or loop goes",
    )
