"""Leaf program: a traced optimizer in which every value belongs to one parameter leaf or to none.

The optimizer is traced once on the user's tree, so masks, labels and shapes are the user's. Each
value of the trace then has an owner: the one leaf that it depends on, or None. Values without an
owner are shared: step counts, learning rates, random keys. Where an operation combines values of
several leaves (a global norm, an all-finite test), the small ones are exported: each is computed on
the stage of its weight and gathered, then the trace continues with all of them. Additions over
leaves keep the order of the user's program.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from layerwise_jax import _jax
from layerwise_jax._jax import Literal, is_key
from layerwise_jax.trace.primitives import ENTRYWISE
from layerwise_jax.trace.program import Op, Operand, Program, Value

MAX_EXPORTED_ENTRIES = 64
"""Largest number of entries of a value that one leaf exports to others."""
# Reduction of a sliced leaf -> function that combines the slices' results.
COMBINE = {
    "reduce_sum": jnp.sum,
    "reduce_prod": jnp.prod,
    "reduce_max": jnp.max,
    "reduce_min": jnp.min,
    "reduce_and": jnp.all,
    "reduce_or": jnp.any,
}


@dataclass(frozen=True, eq=False)
class LeafProgram:
    """Flat program with an owner for every value.

    Attributes:
      trace: the program; it has inputs only, no weights.
      owners: leaf that owns each value, or None, by value number.
      exported: leaf by value, for values of one leaf that other leaves read.
      levels: number of export rounds before each value is known, by value number.
      producers: position of the operation that computes each value.
    """

    trace: Program
    owners: tuple[int | None, ...]
    exported: Mapping[Value, int]
    levels: tuple[int, ...]
    producers: Mapping[Value, int]

    def owner(self, operand: Operand) -> int | None:
        return None if isinstance(operand, Literal) else self.owners[operand]

    @cached_property
    def is_shared(self) -> tuple[bool, ...]:
        """For each operation, True if it runs once for all leaves.

        Other operations without an owner run in every leaf that needs them.
        """
        return tuple(all(self._is_shared(x) for x in op.results) for op in self.trace.ops)

    def _is_shared(self, value: Value) -> bool:
        return (
            self.owners[value] is None
            and value not in self.exported
            and _is_scalar(self.trace.avals[value])
        )

    def ops_for(self, leaf: int, wanted: Iterable[Operand]) -> list[Op]:
        """Operations that a leaf runs for the `wanted` values.

        The search ends at the leaf's inputs, at shared values and at values of other leaves.
        """
        found: set[int] = set()
        stack = [x for x in wanted if not isinstance(x, Literal) and self.owners[x] in (None, leaf)]
        while stack:
            i = self.producers.get(stack.pop())
            if i is None or i in found or self.is_shared[i]:
                continue
            found.add(i)
            stack.extend(x for x in self.trace.ops[i].values if not self._is_read(x, leaf))
        return [self.trace.ops[i] for i in sorted(found)]

    def _is_read(self, value: Value, leaf: int) -> bool:
        """True if a leaf reads an exported value instead of computing it."""
        return value in self.exported and self.owners[value] != leaf


def find_owners(
    trace: Program,
    owned: Sequence[int | None],
    sliced: Collection[int],
    readers: Sequence[int | None] = (),
) -> LeafProgram:
    """Leaf program of a traced optimizer.

    Args:
      trace: the program.
      owned: leaf that owns each input, or None.
      sliced: leaves that are placed in slices. A reduction of such a leaf to one number is computed
        by slices, exported and combined.
      readers: leaf that each of the first outputs belongs to, or None where it is not known yet. An
        output of one leaf that is computed by another (the parts of a concatenation) is exported.

    Raises:
      ValueError: an operation combines values of several leaves with more than
        MAX_EXPORTED_ENTRIES entries.
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
            (levels[x] + _is_from_outside(x, owner, owners, exported) for x in op.values),
            default=0,
        )
        for x in op.results:
            owners[x], levels[x] = owner, level
        if owner in sliced and _reduces_all(op):
            assert owner is not None
            exported[op.results[0]], owners[op.results[0]] = owner, None
    producers = trace.producers()
    for x, reader in zip(trace.outputs, readers, strict=False):
        owner = None if isinstance(x, Literal) else owners[x]
        if isinstance(x, Literal) or owner is None or reader in (None, owner):
            continue
        if _entries(trace.avals[x]) > MAX_EXPORTED_ENTRIES:
            raise _combines_parameters(None if x not in producers else trace.ops[producers[x]])
        exported[x] = owner
    return LeafProgram(trace, tuple(owners), exported, tuple(levels), producers)


def _is_from_outside(
    x: Value, owner: int | None, owners: Sequence[int | None], exported: Mapping
) -> bool:
    return x in exported and (owners[x] is None or owners[x] != owner)


def _owner_of(
    op: Op, trace: Program, owners: Sequence[int | None], levels: Sequence[int]
) -> int | None:
    leaves = {owners[x] for x in op.values} - {None}
    # A sum over leaves adds one leaf's scalar after the other. A partial sum has no owner: if the
    # leaf added last owned it, every leaf would need a round of exports.
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
        raise _combines_parameters(op)
    return next(iter(leaves), None)


def _combines_parameters(op: Op | None) -> ValueError:
    """Error for an operation on several parameters; None for an update handed to another leaf."""
    what = f"{op.name} at {_jax.source_line(op.eqn)}" if op else "the gradient of another parameter"
    return ValueError(
        f"optimizer must combine parameters in values of at most {MAX_EXPORTED_ENTRIES} entries, "
        f"such as a global norm, got {what} on whole parameters. Leave that transformation out, or "
        "apply it to gathered gradients."
    )


def _reduces_all(op: Op) -> bool:
    return op.name in COMBINE and len(op.eqn.params["axes"]) == len(
        _jax.avals_of(op.eqn.invars)[0].shape
    )


def check_sliced(ops: Sequence[Op], name: str) -> None:
    """Check that operations give on a leaf's slices what they give on the whole leaf.

    Raises:
      ValueError: an operation is neither elementwise nor a reduction to one number.
    """
    for op in ops:
        spreads = op.name == "broadcast_in_dim" and all(
            _entries(a) == 1 for a in _jax.avals_of(op.eqn.invars)
        )
        if op.name not in ENTRYWISE and not spreads and not _reduces_all(op):
            raise ValueError(
                f"optimizer must be elementwise on {name}, or reduce it to one number, since its "
                "layers are stacked and live on several stages, got "
                f"{op.name} at {_jax.source_line(op.eqn)}. Use another optimizer for this "
                "parameter, or one parameter per layer."
            )


def run_op(op: Op, operands: Sequence[Any], rows: int | None) -> list[Any]:
    """Results of an operation on a whole leaf (`rows` None), or on `rows` slices of one."""
    if rows is not None and op.name == "broadcast_in_dim" and op.eqn.params["shape"]:
        shape = (rows, *op.eqn.params["shape"][1:])
        return [lax.broadcast_in_dim(operands[0], shape, op.eqn.params["broadcast_dimensions"])]
    return _jax.bind(op.eqn, operands)


def _is_scalar(aval: Any) -> bool:
    return aval.shape == () or is_key(aval)


def _entries(aval: Any) -> int:
    return int(np.prod(aval.shape, dtype=np.int64))
