"""Run of a traced optimizer over all slots: shared values once, values of leaves shard by shard.

Values that leaves export are gathered in rounds: a round computes the shared values that are known
so far, then the exports that depend on them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from layerwise_jax import _jax
from layerwise_jax._jax import Literal
from layerwise_jax.stage.placement import Placement
from layerwise_jax.trace.program import Operand, Value, Weight
from layerwise_jax.train.leaf_program import COMBINE, LeafProgram
from layerwise_jax.train.slot_update import Classifier, Component, Task, run_slot

Wanted = Sequence[tuple[Component, Operand]]
ShardOwner = tuple[int, Component]


@dataclass
class OptimizerRounds:
    """One run of a traced optimizer.

    Attributes:
      program: the traced optimizer.
      placement: placement of the weights.
      mesh: mesh with an axis `stage`.
      classifier: sorts the shards of a slot into classes that run the same operations.
      arrays: arrays of every slot, by component.
      known: shared values, added as they are computed.
    """

    program: LeafProgram
    placement: Placement
    mesh: Mesh
    classifier: Classifier
    arrays: Sequence[Mapping[Component, Any]]
    known: dict[Value, Any]

    def exports(self) -> None:
        """Compute all shared and exported values, in trace order."""
        levels = self.program.levels
        rounds = max(levels, default=0) + 1
        exported: list[list[Value]] = [[] for _ in range(rounds)]
        shared: list[list[Value]] = [[] for _ in range(rounds)]
        for x in self.program.exported:
            exported[levels[x]].append(x)
        for op, is_shared in zip(self.program.trace.ops, self.program.is_shared, strict=True):
            if op.results and is_shared:
                shared[levels[op.results[0]]].append(op.results[0])
        for ready, leaving in zip(shared, exported, strict=True):
            for x in ready:
                self.shared(x)
            self._export(leaving)

    def shared(self, operand: Operand) -> Any:
        """Shared value; computed when first read."""
        if isinstance(operand, Literal):
            return operand.val
        if operand not in self.known:
            op = self.program.trace.ops[self.program.producers[operand]]
            results = _jax.bind(op.eqn, [self.shared(x) for x in op.operands])
            self.known.update(zip(op.results, results, strict=True))
        return self.known[operand]

    def placed(
        self, wanted: Callable[[Weight], Wanted], *, copies: bool = True
    ) -> list[dict[Component, Any]]:
        """Wanted components of every slot.

        Args:
          wanted: components and values that a weight's shard computes.
          copies: compute them on every copy of a weight, not only on the first.
        """
        first = set(self._first_copies.values())
        results = []
        for j, slot in enumerate(self.placement.slots):
            tasks = [
                _task(weight, wanted(weight)) if weight and (copies or (j, row) in first) else None
                for row, weight in enumerate(slot.weights)
            ]
            classes = self.classifier.classes(tasks)
            for x in dict.fromkeys(x for rows in classes for reads in rows.reads for x in reads):
                self.shared(x)
            results.append(run_slot(slot, classes, self.arrays[j], self.known))
        return results

    @cached_property
    def _first_copies(self) -> dict[Weight, tuple[int, int]]:
        return {weight: places[0] for weight, places in self.placement.copies().items()}

    def _export(self, values: Sequence[Value]) -> None:
        """Compute exported values on the first copy of each weight and replicate them."""
        by_leaf: dict[int, list[Value]] = {}
        for x in values:
            by_leaf.setdefault(self.program.exported[x], []).append(x)
        if not by_leaf:
            return
        made = self.placed(
            lambda weight: [
                (Component("exported", n), x) for n, x in enumerate(by_leaf.get(weight.leaf, ()))
            ],
            copies=False,
        )
        row_of = gather_rows(
            {(j, c): x for j, slot in enumerate(made) for c, x in slot.items()}, self.mesh
        )
        parts: dict[Value, list[Any]] = {}
        for weight, (j, row) in self._first_copies.items():
            for n, x in enumerate(by_leaf.get(weight.leaf, ())):
                parts.setdefault(x, []).append(row_of[j, Component("exported", n)](row))
        self.known.update({x: self.combined(x, rows) for x, rows in parts.items()})

    def combined(self, value: Value, parts: Sequence[Any]) -> Any:
        """Value of a leaf, combined from the values of its slices."""
        if len(parts) == 1:
            return parts[0]
        producer = self.program.producers.get(value)
        name = "input" if producer is None else self.program.trace.ops[producer].name
        if name not in COMBINE:
            leaf = self.placement.signature.params_names[self.program.exported[value]]
            raise ValueError(
                f"optimizer must combine {leaf} with other parameters by a reduction "
                f"({', '.join(COMBINE)}), since its layers are stacked and live on several stages, "
                f"got {name}. Use one parameter per layer."
            )
        return COMBINE[name](jnp.stack(parts), axis=0).astype(parts[0].dtype)


def _task(weight: Weight, wanted: Wanted) -> Task | None:
    return Task(weight, tuple(wanted)) if wanted else None


def gather_rows(
    arrays: Mapping[ShardOwner, Any], mesh: Mesh
) -> dict[ShardOwner, Callable[[int], Any]]:
    """Replicate small arrays [shards, ...]; arrays of one dtype are sent as one concatenated array.

    Returns:
      For each array, a function from a shard's number to that shard, on every device.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    by_dtype: dict[Any, dict[ShardOwner, Any]] = {}
    for place, array in arrays.items():
        by_dtype.setdefault(array.dtype, {})[place] = array
    readers: dict[ShardOwner, Callable[[int], Any]] = {}
    for group in by_dtype.values():
        flat = [array.reshape(array.shape[0], -1) for array in group.values()]
        joined = lax.with_sharding_constraint(lax.concatenate(flat, dimension=1), everywhere)
        ends = accumulate(array.shape[1] for array in flat)
        for (place, array), end in zip(group.items(), ends, strict=True):
            readers[place] = partial(_read_row, joined, end, array.shape[1:])
    return readers


def _read_row(joined: Any, end: int, shape: tuple[int, ...], row: int) -> Any:
    return lax.slice(joined, (row, end - math.prod(shape)), (row + 1, end)).reshape(shape)
