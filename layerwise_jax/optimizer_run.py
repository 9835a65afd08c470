"""A traced optimiser run over all slots: what is shared once, what belongs to leaves row by row, in rounds."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from layerwise_jax import _jax
from layerwise_jax._jax import Literal
from layerwise_jax.optimizer_program import REDUCTIONS, LeafProgram
from layerwise_jax.optimizer_rows import Component, Task, classes_of, run_slot
from layerwise_jax.placement import Placement
from layerwise_jax.program import Operand, Value, Weight

COMBINE = {
    "reduce_sum": jnp.sum,
    "reduce_max": jnp.max,
    "reduce_min": jnp.min,
    "reduce_and": jnp.all,
    "reduce_or": jnp.any,
}
assert set(COMBINE) == REDUCTIONS

Wanted = Sequence[tuple[Component, Operand]]


@dataclass
class Run:
    """One run of a traced optimiser.

    Attributes:
      program: the traced optimiser.
      placement: where the weights live.
      mesh: the mesh.
      component_of: the array of a weight's slot that holds an input which the weight's leaf owns.
      whole: a component of the weight's own shape.
      arrays: for every slot, its arrays.
      known: shared values, filled as the run goes.
    """

    program: LeafProgram
    placement: Placement
    mesh: Mesh
    component_of: Callable[[Value, Weight], Component | None]
    whole: Component
    arrays: Sequence[Mapping[Component, Any]]
    known: dict[Value, Any]
    fingerprints: dict[int, Hashable] = field(default_factory=dict)

    def exports(self) -> None:
        """Compute all that is shared, in the order of the trace."""
        ops, levels = self.program.trace.ops, self.program.levels
        rounds = max(levels, default=0) + 1
        exported: list[list[Value]] = [[] for _ in range(rounds)]
        shared: list[list[int]] = [[] for _ in range(rounds)]
        for x in self.program.exported:
            exported[levels[x]].append(x)
        for i, op in enumerate(ops):
            if op.results and self.program.is_shared(op):
                shared[levels[op.results[0]]].append(i)
        for ready, leaving in zip(shared, exported, strict=True):
            for i in ready:
                self.shared(ops[i].results[0])
            self._export(leaving)

    def shared(self, operand: Operand) -> Any:
        """A value that no leaf owns."""
        if isinstance(operand, Literal):
            return operand.val
        if operand not in self.known:
            op = self.program.trace.ops[self.program.producers[operand]]
            results = _jax.bind(op.eqn, [self.shared(x) for x in op.operands])
            self.known.update(zip(op.results, results, strict=True))
        return self.known[operand]

    def placed(self, wanted: Callable[[Weight], Wanted], *, copies: bool = True) -> list[dict[Component, Any]]:
        """For every slot the wanted components, for every copy of a weight or for the first alone."""
        first = {places[0] for places in self.placement.copies().values()}
        results = []
        for j, slot in enumerate(self.placement.slots):
            tasks = [
                self._task(weight, wanted(weight)) if weight and (copies or (j, row) in first) else None
                for row, weight in enumerate(slot.weights)
            ]
            classes = classes_of(self.program, tasks, self.component_of, self.whole, self.fingerprints)
            self._make_reads(reads for rows in classes for reads in rows.reads)
            results.append(run_slot(slot, classes, self.arrays[j], self.known))
        return results

    def _task(self, weight: Weight, wanted: Wanted) -> Task | None:
        name = self.placement.signature.params_names[weight.leaf]
        return Task(weight, name, tuple(wanted)) if wanted else None

    def _make_reads(self, reads: Iterable[Sequence[Value]]) -> None:
        for row in reads:
            for x in row:
                self.shared(x)

    def _export(self, values: Sequence[Value]) -> None:
        """Make values of leaves known to all, each from the first copy of its weight, or of all its slices."""
        by_leaf: dict[int, list[Value]] = {}
        for x in values:
            by_leaf.setdefault(self.program.exported[x], []).append(x)
        if not by_leaf:
            return
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        made = self.placed(
            lambda weight: [(("exported", n), x) for n, x in enumerate(by_leaf.get(weight.leaf, ()))], copies=False
        )
        made = [{c: lax.with_sharding_constraint(x, everywhere) for c, x in slot.items()} for slot in made]
        parts: dict[Value, list[Any]] = {}
        for weight, ((j, row), *_) in self.placement.copies().items():
            for n, x in enumerate(by_leaf.get(weight.leaf, ())):
                parts.setdefault(x, []).append(made[j]["exported", n][row])
        self.known.update({x: self._combined(x, rows) for x, rows in parts.items()})

    def _combined(self, value: Value, parts: Sequence[Any]) -> Any:
        """A leaf's value from those of its slices."""
        if len(parts) == 1:
            return parts[0]
        producer = self.program.producers.get(value)
        name = "input" if producer is None else self.program.trace.ops[producer].name
        if name not in COMBINE:
            leaf = self.placement.signature.params_names[self.program.exported[value]]
            raise ValueError(
                f"The optimiser reads the result of {name} on {leaf} together with other parameters, but the layers of "
                f"{leaf} are stacked and live on several stages. Keep layers apart instead of stacking them."
            )
        return COMBINE[name](jnp.stack(parts), axis=0).astype(parts[0].dtype)
