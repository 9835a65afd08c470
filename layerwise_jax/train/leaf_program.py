"""A traced optimiser, cut by leaves.

An optimiser is traced once on the user's own tree, so that masks, labels and shapes are what the
user wrote them for. Every value of the trace then has an owner: the one leaf that it depends on, or
none. What has no owner is shared: step counts, learning rates, random keys. Where an operation
meets values of several leaves (a global norm, a test whether all are finite), the small ones are
exported: each is made where its weight lives, and from there on the trace is followed operation by
operation, once, so that even the order of additions is the user's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from layerwise_jax import _jax
from layerwise_jax._jax import Jaxpr, JaxprEqn, Literal, is_key
from layerwise_jax.trace.primitives import CALLS, CUSTOM_RULES, ENTRYWISE, REMATS
from layerwise_jax.trace.program import Op, Operand, Value

MAX_EXPORTED_ENTRIES = 64
"""How many entries a value of one leaf may have to be shared with others."""
# Reductions of a leaf in slices, each with the one that combines the slices' results.
COMBINE = {
    "reduce_sum": jnp.sum,
    "reduce_prod": jnp.prod,
    "reduce_max": jnp.max,
    "reduce_min": jnp.min,
    "reduce_and": jnp.all,
    "reduce_or": jnp.any,
}


@dataclass(frozen=True, eq=False)
class FlatTrace:
    """A jaxpr with its calls and branches opened: see `program.Program`, but for leaves and state
    alike.
    """

    ops: tuple[Op, ...]
    avals: tuple[Any, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Operand, ...]
    constants: Mapping[Value, Any]


@dataclass(frozen=True, eq=False)
class LeafProgram:
    """A flat trace whose values have owners.

    Attributes:
      trace: the operations.
      owners: the leaf that owns each value, or None.
      exported: values made by one leaf that others read, with that leaf.
      levels: how many rounds of exports come before each value.
      producers: the position of the operation that makes each value.
    """

    trace: FlatTrace
    owners: tuple[int | None, ...]
    exported: Mapping[Value, int]
    levels: tuple[int, ...]
    producers: Mapping[Value, int]

    def owner(self, operand: Operand) -> int | None:
        return None if isinstance(operand, Literal) else self.owners[operand]

    @cached_property
    def is_shared(self) -> tuple[bool, ...]:
        """Whether each operation is run once for all; others that no leaf owns are run by each leaf
        that needs them.
        """
        return tuple(all(self._is_shared(x) for x in op.results) for op in self.trace.ops)

    def _is_shared(self, value: Value) -> bool:
        return (
            self.owners[value] is None
            and value not in self.exported
            and _is_scalar(self.trace.avals[value])
        )

    def ops_for(self, leaf: int, wanted: Iterable[Operand]) -> list[Op]:
        """What a leaf runs for the `wanted` values: back to its own inputs and to what is
        shared.
        """
        found: set[int] = set()
        stack = [x for x in wanted if not isinstance(x, Literal)]
        while stack:
            i = self.producers.get(stack.pop())
            if i is None or i in found or self.is_shared[i]:
                continue
            found.add(i)
            stack.extend(x for x in self.trace.ops[i].values if not self._is_read(x, leaf))
        return [self.trace.ops[i] for i in sorted(found)]

    def _is_read(self, value: Value, leaf: int) -> bool:
        """Whether a leaf gets an exported value from outside, rather than making it itself."""
        return value in self.exported and self.owners[value] != leaf


def flatten_trace(jaxpr: Jaxpr) -> FlatTrace:
    """Open calls, custom derivatives (nothing differentiates an optimiser) and branches (both
    sides, then a choice).
    """
    flattener = _Flattener()
    inputs = [flattener.value(var.aval) for var in jaxpr.invars]
    outputs = flattener.run(jaxpr, inputs)
    return FlatTrace(
        tuple(flattener.ops),
        tuple(flattener.avals),
        tuple(inputs),
        tuple(outputs),
        flattener.constants,
    )


def find_owners(
    trace: FlatTrace, owned: Sequence[int | None], sliced: Collection[int]
) -> LeafProgram:
    """Give every value its owner.

    Args:
      trace: the trace.
      owned: the leaf that owns each input, or None.
      sliced: leaves that are placed in slices: reductions of all of such a leaf are exported at
        once.

    Raises:
      ValueError: an operation needs large values of several leaves at once.
    """
    owners: list[int | None] = [None] * len(trace.avals)
    for value, leaf in zip(trace.inputs, owned, strict=True):
        owners[value] = leaf
    exported: dict[Value, int] = {}
    levels = [0] * len(trace.avals)
    for op in trace.ops:
        owner = _owner_of(op, trace, owners, levels)
        foreign = [x for x in op.values if owners[x] not in (None, owner)]
        exported.update({x: leaf for x in foreign if (leaf := owners[x]) is not None})
        level = max(
            (levels[x] + _comes_from_outside(x, owner, owners, exported) for x in op.values),
            default=0,
        )
        for x in op.results:
            owners[x], levels[x] = owner, level
        if owner in sliced and _reduces_all(op):
            assert owner is not None
            exported[op.results[0]], owners[op.results[0]] = owner, None
    producers = {x: i for i, op in enumerate(trace.ops) for x in op.results}
    return LeafProgram(trace, tuple(owners), exported, tuple(levels), producers)


def _comes_from_outside(
    x: Value, owner: int | None, owners: Sequence[int | None], exported: Mapping
) -> bool:
    return x in exported and (owners[x] is None or owners[x] != owner)


def _owner_of(
    op: Op, trace: FlatTrace, owners: Sequence[int | None], levels: Sequence[int]
) -> int | None:
    leaves = {owners[x] for x in op.values} - {None}
    # A sum over leaves takes one leaf's scalar after the other: were a partial sum owned by the
    # leaf that was added last, every other leaf would be a round of its own.
    scalar = all(_is_scalar(trace.avals[x]) for x in (*op.values, *op.results))
    if scalar and any(owners[x] is None and levels[x] for x in op.values):
        return None
    if len(leaves) > 1:
        large = [
            x
            for x in op.values
            if owners[x] is not None and _entries(trace.avals[x]) > MAX_EXPORTED_ENTRIES
        ]
        leaves = {owners[x] for x in large}
    if len(leaves) > 1:
        raise ValueError(
            f"The optimiser's operation {op.name} at {_jax.source_line(op.eqn)} needs several "
            "parameters at once. "
            "On a pipeline, parameters may meet in scalars only, such as a global norm. Leave "
            "this transformation out, "
            "or apply it to gathered gradients."
        )
    return next(iter(leaves), None)


def _reduces_all(op: Op) -> bool:
    return op.name in COMBINE and len(op.eqn.params["axes"]) == len(
        _jax.avals_of(op.eqn.invars)[0].shape
    )


def check_sliced(ops: Sequence[Op], name: str) -> None:
    """Refuse operations that would not give on a leaf's slices what they give on the whole.

    Raises:
      ValueError: an operation is neither elementwise, nor a reduction to one number.
    """
    for op in ops:
        spreads = op.name == "broadcast_in_dim" and all(
            _entries(a) == 1 for a in _jax.avals_of(op.eqn.invars)
        )
        if op.name not in ENTRYWISE and not spreads and not _reduces_all(op):
            raise ValueError(
                f"The optimiser applies {op.name} (at {_jax.source_line(op.eqn)}) to {name}, "
                "whose layers are stacked "
                "and live on several stages. Only elementwise operations and norms are exact "
                "there. Use an optimiser "
                "that is elementwise on this parameter, or keep layers apart instead of stacking "
                "them."
            )


def run_op(op: Op, operands: Sequence[Any], rows: int | None) -> list[Any]:
    """Run an operation on a leaf, or on so many `rows` of one (None: on all of it)."""
    if rows is not None and op.name == "broadcast_in_dim" and op.eqn.params["shape"]:
        shape = (rows, *op.eqn.params["shape"][1:])
        return [lax.broadcast_in_dim(operands[0], shape, op.eqn.params["broadcast_dimensions"])]
    return _jax.bind(op.eqn, operands)


def _is_scalar(aval: Any) -> bool:
    return aval.shape == () or is_key(aval)


def _entries(aval: Any) -> int:
    return int(np.prod(aval.shape, dtype=np.int64))


class _Flattener:
    """Walks a jaxpr once, opening what may be opened."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.avals: list[Any] = []
        self.constants: dict[Value, Any] = {}

    def value(self, aval: Any) -> Value:
        self.avals.append(aval)
        return len(self.avals) - 1

    def run(self, jaxpr: Jaxpr, args: Sequence[Operand]) -> list[Operand]:
        env: dict[Any, Operand] = dict(zip(jaxpr.invars, args, strict=True))
        for var, constant in zip(jaxpr.constvars, jaxpr.consts, strict=True):
            value = self.value(var.aval)
            env[var], self.constants[value] = value, constant

        def read(atom: Any) -> Operand:
            return atom if isinstance(atom, Literal) else env[atom]

        for eqn in jaxpr.eqns:
            env.update(zip(eqn.outvars, self.open(eqn, [read(x) for x in eqn.invars]), strict=True))
        return [read(x) for x in jaxpr.outvars]

    def open(self, eqn: JaxprEqn, operands: Sequence[Operand]) -> Sequence[Operand]:
        name = eqn.primitive.name
        if name in CALLS | REMATS | CUSTOM_RULES:
            return self.run(_jax.inner_jaxpr(eqn), operands)
        if name == "cond" and not eqn.effects:
            return self.branch(eqn, operands)
        return self.keep(eqn, operands)

    def keep(self, eqn: JaxprEqn, operands: Sequence[Operand]) -> Sequence[Operand]:
        op = Op(eqn, tuple(operands), tuple(self.value(var.aval) for var in eqn.outvars))
        self.ops.append(op)
        return op.results

    def branch(self, eqn: JaxprEqn, operands: Sequence[Operand]) -> Sequence[Operand]:
        """Every branch, then a choice of each result: the values are those of the branch that is
        taken.
        """
        index, *args = operands
        branches = eqn.params["branches"]
        if isinstance(index, Literal):
            taken = int(np.clip(int(index.val), 0, len(branches) - 1))
            return self.run(branches[taken], args)
        results = [self.run(branch, args) for branch in branches]
        return [
            self.choose(eqn.invars[0].aval, index, options)
            for options in zip(*results, strict=True)
        ]

    def choose(self, index_aval: Any, index: Operand, options: Sequence[Operand]) -> Operand:
        def pick(index: Any, *values: Any) -> Any:
            return lax.select_n(index if len(values) > 2 else index > 0, *values)

        avals: list[Any] = [x.aval if isinstance(x, Literal) else self.avals[x] for x in options]
        types = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in [index_aval, *avals]]
        return self.run(jax.make_jaxpr(pick)(*types), [index, *options])[0]
