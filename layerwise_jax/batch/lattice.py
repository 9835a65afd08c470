"""Abstract values of the batch-splitting analysis: the roles that values have for the batch.

A function is traced twice: on one part of the batch and on the full batch, `parts` times as long.
The role of a value says how its full form follows from its forms in the parts. Every role has a
`ratio`: the factor between the two that comes from numbers such as 1 / batch_size, which differ
between the traces. `parts` is a whole number for equal parts; for a part of another size it is
Fraction(batch, size), and ratios are exact fractions of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import isclose, isfinite
from numbers import Rational
from typing import Any, Literal

import numpy as np

from layerwise_jax._jax import JaxprEqn, source_line

RATIO_TOLERANCE = 1e-5
"""Relative: above the rounding of a float32 literal, below the step between numbers of parts."""

LARGEST_DENOMINATOR = 10_000
"""Ratios of literals are snapped to fractions of this size, which undoes their rounding."""

Ratio = Fraction | float
"""An exact fraction, or NaN where the two traces have no common factor."""

Extreme = Literal["max", "min"]

Parts = int | Fraction
"""Full batch over one part."""


def exact_ratio(value: Any) -> Ratio:
    """A number as the nearest small fraction; infinities and NaN become NaN."""
    if isinstance(value, Fraction):
        return value
    if isinstance(value, Rational):
        return Fraction(value)
    if not isfinite(value):  # a count over zero, say
        return float("nan")
    return Fraction(value).limit_denominator(LARGEST_DENOMINATOR)


def _snap_ratio(role: Any) -> None:
    """Store the ratio of a new role as an exact fraction."""
    object.__setattr__(role, "ratio", exact_ratio(role.ratio))


@dataclass(frozen=True)
class Replicated:
    """The same in every part, and constant along an axis whose length follows the batch.

    full = ratio * part.

    Attributes:
      fill: the number that every entry is, in the part's trace and in the full one, where known.
    """

    ratio: Ratio = Fraction(1)
    fill: tuple[Any, Any] | None = None
    __post_init__ = _snap_ratio

    @property
    def is_zero(self) -> bool:
        return self.fill is not None and self.fill[0] == 0 and self.fill[1] == 0


@dataclass(frozen=True)
class Split:
    """Each example has its own equal block along `axis`: full = ratio * concatenated parts."""

    axis: int
    ratio: Ratio = Fraction(1)
    __post_init__ = _snap_ratio


@dataclass(frozen=True)
class PartialSum:
    """Linear in a sum over examples: full = ratio * sum of the parts.

    A ratio of 1 is a sum over the examples, 1 / parts is a mean.
    """

    ratio: Ratio
    __post_init__ = _snap_ratio


@dataclass(frozen=True)
class PartialExtreme:
    """A maximum or minimum over examples: full = the largest or smallest of the parts."""

    which: Extreme


@dataclass(frozen=True)
class BatchIota:
    """Numbering of the `length` rows of a part along `axis`, plus an offset in each trace.

    As an index of each row's own entry it means the same in a part. As a number it does not, unless
    the operations that made it are run at the full batch.

    Attributes:
      sources: positions in the program of those operations; None in the body of a loop or branch.
      offset: the first number in the part's trace and in the full one.
    """

    axis: int
    length: int
    sources: frozenset[int] | None
    offset: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class IndexColumns:
    """Index vectors [..., columns] of a gather or scatter; some columns number the rows."""

    axis: int
    columns: tuple[Role, ...]


@dataclass(frozen=True)
class Permutation:
    """Index vector [rows] that holds every row of a part once, and every row of the batch once.

    Attributes:
      name: the operation that made it; the same operation made the same order.
      length: rows of a part.
      is_inverse: whether it is the inverse of that order.
      shift: 1 after the length was added, as JAX does to negative indices.
    """

    name: int
    length: int
    is_inverse: bool = False
    shift: int = 0

    def inverse(self) -> Permutation:
        return replace(self, is_inverse=not self.is_inverse)

    def shifted(self) -> Permutation:
        return replace(self, shift=1)


@dataclass(frozen=True)
class Permuted:
    """Rows along `axis` in the order `by`: rows[by], in a part and in the full batch."""

    axis: int
    by: Permutation
    ratio: Ratio = Fraction(1)
    __post_init__ = _snap_ratio


Cause = Literal["statistics", "unknown", "size", "draw", "derivative"]


@dataclass(frozen=True)
class NotSeparable:
    """Value of the full batch that does not follow from its forms in the parts, with the reason.

    Attributes:
      cause: "statistics" where examples meet, "unknown" where they may, "size" where the length of
        the batch enters, "draw" where a draw by shape cannot be made for the full batch,
        "derivative" where a custom derivative rule takes a part's share of a cotangent for all.
      why: what the operation does, to be read after its name.
      eqn: the operation; None for an input or constant.
      after: the line of the user's code before it, where its own is not known.
    """

    cause: Cause
    why: str
    eqn: JaxprEqn | None = None
    after: str = ""

    @property
    def is_excusable(self) -> bool:
        """True if per-microbatch statistics accept it."""
        return self.cause in ("statistics", "unknown")

    def __str__(self) -> str:
        return f"{described(self.eqn, self.after) if self.eqn else 'the function'} {self.why}"


UNUSED = NotSeparable("unknown", "is not needed for any output")

Role = (
    Replicated
    | Split
    | PartialSum
    | PartialExtreme
    | BatchIota
    | IndexColumns
    | Permutation
    | Permuted
    | NotSeparable
)


class NotSeparableError(Exception):
    """Raised by a rule: the result of its operation is `NotSeparable`."""

    def __init__(self, why: str, cause: Cause = "statistics"):
        super().__init__(why)
        self.cause: Cause = cause


def described(eqn: JaxprEqn, after: str = "") -> str:
    """An operation and its line in the user's code, or the line before it where JAX knows none."""
    line = source_line(eqn)
    inside = f"inside of JAX, after {after}" if after else "inside of JAX"
    return f"{eqn.primitive.name} at {line}" if line else f"{eqn.primitive.name} ({inside})"


PAIRS = "has a row and a column for each example, which pairs examples"
SIZE = "uses the length of the batch in a way that is not a plain factor of its result"


@dataclass(frozen=True)
class OpContext:
    """One operation in both traces, with the roles of its operands.

    Attributes:
      micro, full: the equation in the part's trace and in the full one.
      parts: full batch over one part.
    """

    micro: JaxprEqn
    full: JaxprEqn
    roles: tuple[Role, ...]
    parts: Parts

    @property
    def name(self) -> str:
        return self.micro.primitive.name

    @property
    def params(self) -> dict[str, Any]:
        return self.micro.params

    def shape(self, operand: int = 0) -> tuple[int, ...]:
        """Shape of an operand in a part."""
        return _aval(self.micro.invars[operand]).shape

    def full_shape(self, operand: int = 0) -> tuple[int, ...]:
        """Shape of an operand in the full batch."""
        return _aval(self.full.invars[operand]).shape

    def result_shapes(self, result: int = 0) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of a result in a part and in the full batch."""
        return _aval(self.micro.outvars[result]).shape, _aval(self.full.outvars[result]).shape

    @property
    def dtypes(self) -> tuple[Any, Any]:
        """Dtypes of the first operand and of the first result."""
        return _aval(self.micro.invars[0]).dtype, _aval(self.micro.outvars[0]).dtype

    def axis(self, operand: int = 0) -> int | None:
        """Axis along which an operand has a block for each example, if any."""
        role = self.roles[operand]
        # A batch of one example has no axis that differs between the traces by itself.
        if isinstance(role, Split | BatchIota | IndexColumns | Permuted):
            return role.axis
        return one_scaling_axis(self.shape(operand), self.full_shape(operand))

    def has_rows(self, operand: int) -> bool:
        return isinstance(self.roles[operand], Split)

    def with_roles(self, roles: Sequence[Role]) -> OpContext:
        return replace(self, roles=tuple(roles))


def _aval(atom: Any) -> Any:
    return atom.aval


def scaling_axes(micro: Sequence[int], full: Sequence[int]) -> tuple[int, ...]:
    """Axes whose lengths follow the batch."""
    return tuple(i for i, (m, f) in enumerate(zip(micro, full, strict=True)) if m != f)


def one_scaling_axis(micro: Sequence[int], full: Sequence[int]) -> int | None:
    """The axis whose length follows the batch, if any.

    Raises:
      NotSeparableError: there are two.
    """
    axes = scaling_axes(micro, full)
    if len(axes) > 1:
        raise NotSeparableError(PAIRS)
    return axes[0] if axes else None


def same(a: Ratio, b: Ratio) -> bool:
    """True if two ratios are equal up to the rounding of literals; NaN equals nothing."""
    # A mean divides by a float32 literal of the length, which is rounded.
    return isclose(a, b, rel_tol=RATIO_TOLERANCE)


def known(micro: Any, full: Any) -> Replicated:
    """Role of a number that is known in both traces."""
    # Second case: NaN in both traces, which is unequal to itself.
    if micro == full or (micro != micro and full != full):
        return Replicated(Fraction(1), (micro, full))
    # Zero in one trace only, or complex numbers: no factor takes one to the other.
    has_ratio = micro and full and np.isrealobj(micro)
    return Replicated(float(full) / float(micro) if has_ratio else float("nan"), (micro, full))


def build(axis: int | None, ratio: Ratio, summed: bool) -> Role:
    """Role of a result: PartialSum if `summed`, else Split, or Replicated without an axis."""
    if summed:
        return PartialSum(ratio)
    return Replicated(ratio) if axis is None else Split(axis, ratio)


def checked(role: Role, micro: tuple[int, ...], full: tuple[int, ...], parts: Parts) -> Role:
    """The role of a result, if its shapes in the two traces bear it out.

    Raises:
      NotSeparableError: they do not.
    """
    axes = scaling_axes(micro, full)  # usually none or the axis of the examples
    # Example: [b + 1] of a part, [parts * b + 1] of the full batch.
    if any(full[i] != parts * micro[i] for i in axes):
        raise NotSeparableError(
            f"makes an array of {list(micro)} of a part and {list(full)} of the full batch", "size"
        )
    # A sum has no axis of examples left; broadcast back to one, it is a statistic.
    if isinstance(role, PartialSum | PartialExtreme) and axes:
        raise NotSeparableError(
            "gives every example one result over all examples (as batch normalisation in training "
            "does)"
        )
    if not isinstance(role, Split | BatchIota | IndexColumns | Permuted):
        return role
    # A second axis that follows the batch, or examples that no part has whole.
    if set(axes) - {role.axis} or full[role.axis] % parts:
        raise NotSeparableError(PAIRS)
    if full[role.axis] != parts * micro[role.axis]:
        raise NotSeparableError(
            "makes something of each example that is not as long as the batch", "size"
        )
    return role
