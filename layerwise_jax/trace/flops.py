"""FLOPs and memory traffic of a jaxpr, with loop bodies counted once per iteration.

XLA's `cost_analysis` counts a loop body once and gives nothing for absent devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from layerwise_jax.trace.primitives import (
    CALLS,
    LIBRARY_CALLS,
    MOVES,
    REDUCTIONS,
    REMATS,
    PrimitiveClass,
    names_of,
)

SLICE_READS = names_of(PrimitiveClass.GATHER)

# Slices written in place: (position of the operand that holds them).
PARTIAL_WRITES = {
    name: 1 if name == "dynamic_update_slice" else 2 for name in names_of(PrimitiveClass.SCATTER)
}

# Operations that run one jaxpr on just their operands.
ONE_JAXPR = CALLS | REMATS | {"custom_jvp_call"}


@dataclass(frozen=True)
class Work:
    """Work of a program.

    Attributes:
      flops: floating-point operations; a multiply-add is two.
      bytes_accessed: bytes read and written by operations that XLA does not fuse: products,
        convolutions, reductions, gathers, scatters, sorts.
      uncounted: names of operations with unknown work, in order. Library and kernel calls count as
        their operands read and results written; loops of unknown length count as one iteration.
    """

    flops: float = 0.0
    bytes_accessed: float = 0.0
    uncounted: tuple[str, ...] = ()

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops,
            self.bytes_accessed + other.bytes_accessed,
            _merged(self.uncounted, other.uncounted),
        )

    def __mul__(self, repeats: int) -> Work:
        return Work(self.flops * repeats, self.bytes_accessed * repeats, self.uncounted)

    def __or__(self, other: Work) -> Work:
        """Work of a choice between two programs: the larger of each number."""
        return Work(
            max(self.flops, other.flops),
            max(self.bytes_accessed, other.bytes_accessed),
            _merged(self.uncounted, other.uncounted),
        )


def count_work(jaxpr: Any) -> Work:
    """Work of a jaxpr, closed or not, on one device.

    Inputs are read and outputs written at least once; an embedding table that is only looked up
    counts the rows read. Equations that no output depends on are not counted. A `shard_map` counts
    one device's share, a `cond` the larger branch.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    work = _body(jaxpr)
    whole = _read_whole(jaxpr)
    boundary = sum(_nbytes(x) for i, x in enumerate(jaxpr.invars) if i in whole) + sum(
        map(_nbytes, jaxpr.outvars)
    )
    return Work(work.flops, max(work.bytes_accessed, boundary), work.uncounted)


def _body(jaxpr: Any) -> Work:
    return sum((_equation(eqn) for eqn in _live_equations(getattr(jaxpr, "jaxpr", jaxpr))), Work())


def _live_equations(jaxpr: Any) -> list[Any]:
    """Equations that an output or an effect depends on."""
    needed = {id(x) for x in jaxpr.outvars}
    live = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(id(x) in needed for x in eqn.outvars):
            live.append(eqn)
            needed |= {id(x) for x in eqn.invars}
    return live[::-1]


def _read_whole(jaxpr: Any) -> set[int]:
    """Positions of the inputs that some operation reads other than by slices."""
    whole: set[int] = set()
    for eqn in _live_equations(getattr(jaxpr, "jaxpr", jaxpr)):
        inner = [each for each in _jaxprs(eqn.params.values()) if eqn.primitive.name in ONE_JAXPR]
        if eqn.primitive.name in SLICE_READS:
            whole |= {id(x) for x in eqn.invars[1:]}
        elif inner:
            whole |= {id(eqn.invars[i]) for i in _read_whole(inner[0])}
        else:
            whole |= {id(x) for x in eqn.invars}
    return {i for i, x in enumerate(getattr(jaxpr, "jaxpr", jaxpr).invars) if id(x) in whole}


def _equation(eqn: Any) -> Work:
    name = eqn.primitive.name
    if name in _RULES:
        return _RULES[name](eqn)
    if name in MOVES:
        return Work()
    if name in LIBRARY_CALLS:
        return _opaque(eqn)
    if name in SLICE_READS:
        return Work(0.0, 2 * _nbytes(eqn.outvars[0]) + sum(_nbytes(x) for x in eqn.invars[1:]))
    if name in PARTIAL_WRITES:
        rows = eqn.invars[PARTIAL_WRITES[name]]
        return Work(_elements(rows) if "scatter" in name else 0.0, 2 * _nbytes(rows))
    if name in REDUCTIONS:
        return Work(_elements(eqn.invars[0]), _traffic(eqn))
    inner = list(_jaxprs(eqn.params.values()))
    return (
        sum((_body(each) for each in inner), Work())
        if inner
        else Work(sum(_elements(x) for x in eqn.outvars))
    )


def _dot(eqn: Any) -> Work:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    summed = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
    return Work(2.0 * _elements(eqn.outvars[0]) * summed, _traffic(eqn))


def _ragged_dot(eqn: Any) -> Work:
    """Grouped product: each row is multiplied by the matrix of its group only."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = numbers.dot_dimension_numbers
    rows, groups = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    ragged_contraction = set(numbers.lhs_ragged_dimensions) & set(contracted)
    summed = math.prod(rows[i] for i in contracted)
    # Groups along the contracted dimension: each group sums its own part of it.
    results = math.prod(groups[1:]) if ragged_contraction else math.prod(groups)
    return Work(2.0 * results * summed, _traffic(eqn))


def _convolution(eqn: Any) -> Work:
    """Convolution: each output element sums over the kernel.

    Zeros inserted by input dilation are not counted; padding is.
    """
    kernel = eqn.invars[1].aval.shape
    summed = math.prod(kernel) / max(1, kernel[eqn.params["dimension_numbers"].rhs_spec[0]])
    return Work(
        2.0 * _elements(eqn.outvars[0]) * summed / math.prod(eqn.params["lhs_dilation"]),
        _traffic(eqn),
    )


def _sort(eqn: Any) -> Work:
    length = eqn.invars[0].aval.shape[
        eqn.params["dimension" if eqn.primitive.name == "sort" else "axis"]
    ]
    return Work(_elements(eqn.invars[0]) * math.ceil(math.log2(max(length, 2))), _traffic(eqn))


def _scan(eqn: Any) -> Work:
    return _body(eqn.params["jaxpr"]) * eqn.params["length"]


def _while(eqn: Any) -> Work:
    return (
        _body(eqn.params["cond_jaxpr"])
        + _body(eqn.params["body_jaxpr"])
        + Work(uncounted=("while",))
    )


def _cond(eqn: Any) -> Work:
    work = Work()
    for branch in eqn.params["branches"]:
        work = work | _body(branch)
    return work


def _opaque(eqn: Any) -> Work:
    """Cost estimate that the call carries, as Pallas kernels may; else its traffic."""
    estimate = eqn.params.get("cost_estimate")
    if estimate is not None:
        return Work(float(estimate.flops), float(estimate.bytes_accessed))
    name = eqn.params.get("target_name") or eqn.params.get("call_target_name") or eqn.primitive.name
    return Work(0.0, _traffic(eqn), (str(name),))


_RULES: dict[str, Callable[[Any], Work]] = {
    "dot_general": _dot,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _convolution,
    "sort": _sort,
    "top_k": _sort,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}


def _jaxprs(values: Any) -> Iterator[Any]:
    """Jaxprs among parameters, also inside tuples and lists."""
    for value in values:
        if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
            yield value
        elif isinstance(value, tuple | list):
            yield from _jaxprs(value)


def _merged(a: tuple[str, ...], b: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*a, *b)))


def _elements(x: Any) -> float:
    return float(math.prod(getattr(x.aval, "shape", ())))


def _traffic(eqn: Any) -> float:
    return float(sum(_nbytes(x) for x in (*eqn.invars, *eqn.outvars)))


def _nbytes(x: Any) -> float:
    """Bytes of an array; 0 for tokens."""
    dtype = getattr(x.aval, "dtype", None)
    return 0.0 if dtype is None else _elements(x) * dtype.itemsize
