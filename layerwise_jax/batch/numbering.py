"""Numberings of the examples that must be those of each part, under per-microbatch statistics.

An iota over the examples that is read as data counts through the full batch, so that a position or
a key folded from it is that of the unstaged program. An operation that mixes the examples of a part
(a sort whose payload becomes an index) needs the part's own numbers, from 0: the full batch's would
point outside of the part.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from layerwise_jax.batch.lattice import UNUSED, NotSeparable, PartialSum, Role
from layerwise_jax.batch.pairs import PairedOp, ProgramPair
from layerwise_jax.trace.program import Value

# Keys and seeds made from numbers are not numbers any more: any part may draw with any of them.
RANDOM = frozenset("random_fold_in random_seed".split())


def mixed_numberings(
    pair: ProgramPair,
    roles: Mapping[Value, Role],
    numbered: Collection[int],
    statistics: Collection[int],
) -> frozenset[int]:
    """Positions of the iotas whose numbers reach an operation that mixes examples.

    Args:
      pair: the two programs.
      roles: the role of every value of the full program.
      numbered: positions of the iotas that are read as data of the full batch.
      statistics: positions of the operations that took a sum over the part for a statistic.
    """
    sources: dict[Value, frozenset[int]] = {}  # iotas that a value is made from
    weights = set(pair.full.weights)
    found: set[int] = set()
    for op in pair.ops:
        # Numberings that the operands are made from, and the operation itself if it is one.
        behind = [sources[x] for x in op.full.values if x in sources]
        here = frozenset({op.position} & set(numbered)).union(*behind)
        if op.full.name in RANDOM:
            here = frozenset()
        sources.update(dict.fromkeys(op.full.results, here))
        # `weights` grows to all values that depend on a weight: activations.
        if weights.intersection(op.full.values):  # activations, from here on
            weights.update(op.full.results)
        results = [roles[x] for x in op.full.results]
        if any(isinstance(role, NotSeparable) and role is not UNUSED for role in results):
            found |= here
        if op.position in statistics:
            found.update(*(sources[x] for x in _sums_of_data(op, roles, weights) if x in sources))
    return frozenset(found)


def _sums_of_data(
    op: PairedOp, roles: Mapping[Value, Role], weights: Collection[Value]
) -> list[Value]:
    """Operands that are sums over examples of inputs only; those of activations are statistics."""
    return [x for x in op.full.values if isinstance(roles[x], PartialSum) and x not in weights]
