"""Equivalent op sequences that JAX emits for a batch of one example.

`jnp.matmul` drops an axis of length one before it multiplies, and `jnp.take_along_axis` reads along
it instead of batching over it. Such a sequence is matched against the operations of the full batch
and replaced by them, at the shapes of one example.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import jax

from layerwise_jax._jax import JaxprEqn
from layerwise_jax.trace.program import Op, Operand, Value

LONGEST = 4
"""Operations in the longest equivalent sequence."""

Twin = Callable[[Operand], Operand | None]
"""Value of the part's program for an operand of the full batch's."""


@dataclass(frozen=True)
class EquivalentOps:
    """Operations of a part's program that are equivalent to some of the full batch's.

    Attributes:
      ops: the full batch's operations, as they would read for one example.
      length: number of operations that the part has for them.
      result: the part's value of the last one's result.
    """

    ops: tuple[Op, ...]
    length: int
    result: Value


def equivalent_ops(micro: Sequence[Op], full: Sequence[Op], twin: Twin) -> EquivalentOps | None:
    """Match the first operations of `micro` against the first of `full`; None if they differ."""
    if full[0].name == "dot_general":
        return _matmul(micro, full[0], twin)
    if [op.name for op in micro[:2]] == ["reshape", "gather"]:
        return _take_along_axis(micro, full, twin)
    return None


def _matmul(micro: Sequence[Op], full: Op, twin: Twin) -> EquivalentOps | None:
    """Match squeeze, squeeze, dot_general, broadcast_in_dim against a batched dot_general."""
    if [op.name for op in micro[:4]] != ["squeeze", "squeeze", "dot_general", "broadcast_in_dim"]:
        return None
    left, right, dot, grown = micro[:4]
    if [left.operands[0], right.operands[0]] != [twin(x) for x in full.operands]:
        return None
    if dot.operands != (*left.results, *right.results) or grown.operands != dot.results:
        return None
    dropped = [op.eqn.params["dimensions"] for op in (left, right)]
    if not _have_same_settings(dot, full):
        return None
    # The dropped axis must be the same batch axis of both operands.
    contracting, batch = full.eqn.params["dimension_numbers"]
    places = [
        list(axes).index(d[0]) if d and d[0] in axes else -1
        for d, axes in zip(dropped, batch, strict=True)
    ]
    if any(len(d) != 1 for d in dropped) or places[0] != places[1] or places[0] < 0:
        return None
    # The product of the part has the same axes, less the dropped one, renumbered.
    expected = tuple(
        tuple(
            [_after(axis, d[0]) for axis in axes if axis != d[0]]
            for axes, d in zip(sides, dropped, strict=True)
        )
        for sides in (contracting, batch)
    )
    given = tuple(
        tuple(list(axes) for axes in sides) for sides in dot.eqn.params["dimension_numbers"]
    )
    # The batched product at a part's shapes, batch axis of length 1 included.
    eqn = _at(full, [_shape(left), _shape(right)])
    rank = len(_result_shape(eqn))
    # broadcast_in_dim restores the dropped batch axis at its place in the result.
    kept = tuple(axis for axis in range(rank) if axis != places[0])
    if (
        given != expected
        or tuple(grown.eqn.params["broadcast_dimensions"]) != kept
        or not _same_shapes(grown.eqn, eqn)
    ):
        return None
    return EquivalentOps((Op(eqn, full.operands, full.results),), 4, grown.results[0])


def _take_along_axis(micro: Sequence[Op], full: Sequence[Op], twin: Twin) -> EquivalentOps | None:
    """Match reshape, gather along an axis of length one against a gather that batches over it.

    The gather of the full batch may have a reshape of its indices before it, too.
    """
    whole = list(full[: 2 if full[0].name == "reshape" else 1])  # [reshape, gather] or [gather]
    reshape, gather = micro[:2]
    last = whole[-1]
    if last.name != "gather" or (whole[0] is not last and last.operands[1:] != whole[0].results):
        return None
    sources = last.operands[0], (last.operands[1] if whole[0] is last else whole[0].operands[0])
    if (gather.operands[0], reshape.operands[0]) != tuple(map(twin, sources)):
        return None
    if gather.operands[1:] != reshape.results:
        return None
    sizes = _shape(last, 1)  # indices of the full batch: [..., index vector]
    # The axis of the indices that the part's gather reads along, its length being one.
    axes = [
        axis
        for axis in range(len(sizes) - 1)
        if _read_along(last, axis) == gather.eqn.params["dimension_numbers"]
    ]
    if len(axes) != 1 or not _have_same_settings(gather, last):
        return None
    # Shape of the indices for one example.
    one = (*sizes[: axes[0]], 1, *sizes[axes[0] + 1 :])
    if prod(one) != prod(_shape(reshape)) or (whole[0] is last and one != _shape(reshape)):
        return None
    eqns = [_at(last, [_shape(gather), one])]
    if whole[0] is not last:
        eqns.insert(0, _at(whole[0], [_shape(reshape)], new_sizes=one))
    ops = tuple(Op(eqn, op.operands, op.results) for eqn, op in zip(eqns, whole, strict=True))
    return EquivalentOps(ops, 2, gather.results[0]) if _same_shapes(eqns[-1], gather.eqn) else None


def _read_along(gather: Op, index_axis: int) -> Any:
    """Dimension numbers of a gather that reads along an axis of its indices, of length one.

    None if the gather does not batch over that axis.
    """
    numbers = gather.eqn.params["dimension_numbers"]
    if index_axis not in numbers.start_indices_batching_dims:
        return None
    place = list(numbers.start_indices_batching_dims).index(index_axis)
    rank = len(_result_shape(gather.eqn))
    # The axis of the result that this axis of the indices becomes: a slice of one.
    along = [axis for axis in range(rank) if axis not in numbers.offset_dims][index_axis]
    others = [axis for i, axis in enumerate(numbers.start_indices_batching_dims) if i != place]
    return numbers._replace(
        # A slice of length 1 along the axis replaces batching over it.
        offset_dims=tuple(sorted((*numbers.offset_dims, along))),
        operand_batching_dims=_without(numbers.operand_batching_dims, place),
        start_indices_batching_dims=tuple(_after(axis, index_axis) for axis in others),
    )


def _without(items: Sequence[int], place: int) -> tuple[int, ...]:
    return (*items[:place], *items[place + 1 :])


def _after(axis: int, dropped: int) -> int:
    return axis - (axis > dropped)


def _shape(op: Op, operand: int = 0) -> tuple[int, ...]:
    """The shape of an operand."""
    return op.eqn.invars[operand].aval.shape  # type: ignore[attr-defined]


def _result_shape(eqn: JaxprEqn) -> tuple[int, ...]:
    return eqn.outvars[0].aval.shape  # type: ignore[attr-defined]


def _same_shapes(a: JaxprEqn, b: JaxprEqn) -> bool:
    return _result_shape(a) == _result_shape(b)


def _have_same_settings(micro: Op, full: Op) -> bool:
    """True if two operations have the same parameters, dimension numbers left out."""
    params = full.eqn.params
    return all(
        repr(x) == repr(params[name])
        for name, x in micro.eqn.params.items()
        if name != "dimension_numbers"
    )


def _at(op: Op, shapes: Sequence[tuple[int, ...]], **changed: Any) -> JaxprEqn:
    """An operation at other shapes of its operands."""
    avals: list[Any] = [var.aval for var in op.eqn.invars]
    types = [
        jax.ShapeDtypeStruct(shape, aval.dtype) for shape, aval in zip(shapes, avals, strict=True)
    ]
    params = {**op.eqn.params, **changed}
    return jax.make_jaxpr(lambda *x: op.eqn.primitive.bind(*x, **params))(*types).eqns[0]
