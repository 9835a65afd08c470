"""An optimizer's part on one column, and the small values that it exchanges with other columns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from layerwise_jax.mesh import STAGE
from layerwise_jax.stage.placement import Staged
from layerwise_jax.trace.program import Value, Weight
from layerwise_jax.train.leaf_program import LeafProgram
from layerwise_jax.train.optimizer import StagedOptimizer
from layerwise_jax.train.optimizer_trace import TracedOptimizer
from layerwise_jax.train.rounds import OptimizerRounds
from layerwise_jax.train.slot_update import Component
from layerwise_jax.train.state import StagedState

# What a column exports in one round: one vector for each dtype, by the dtype's name.
Vectors = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class ColumnOptimizer(StagedOptimizer):
    """The optimizer of the user's tree, run for the slots of one column.

    Attributes:
      whole: the optimizer, traced on the user's tree.
      exports: for every column, the weights whose exported values come from there: the first copy
        of each.
      parts: exported values that have arrived, from each weight of their leaf.
    """

    whole: TracedOptimizer | None = None
    exports: tuple[tuple[Weight, ...], ...] = ()
    parts: Mapping[Value, Sequence[Any]] = field(default_factory=dict)

    @cached_property
    def traced(self) -> TracedOptimizer:
        assert self.whole is not None
        return self.whole

    @property
    def everywhere(self) -> NamedSharding:
        """Sharding of shared values (counts, norms): replicated over the column."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def on_stage(self) -> NamedSharding:
        """The sharding of slots."""
        return NamedSharding(self.mesh, PartitionSpec(STAGE))

    @property
    def state_shardings(self) -> StagedState:
        """The shardings of the column's state."""
        layout = self._layout
        placed = {
            slot.name: tuple(layout.sharding((1, *c.shape)) for c in components)
            for slot, components in zip(self.placement.slots, layout.components, strict=True)
        }
        return StagedState((self.everywhere,) * len(layout.shared), placed)

    def export_of_init(self, column: int, level: int, arrived: Any, staged: Staged) -> Vectors:
        """Vectors that this column exports in round `level` of `init`, one per dtype."""
        program = self.traced.init
        run = self.with_arrived(program, arrived)._rounds_of_init(staged)
        return self._packed(run, column, level)

    def export_of_update(
        self,
        column: int,
        level: int,
        arrived: Any,
        grads: Staged,
        state: StagedState,
        staged: Staged,
    ) -> Vectors:
        """Vectors that this column exports in round `level` of `update`, one per dtype."""
        program = self.traced.update
        run = self.with_arrived(program, arrived)._rounds_of_update(grads, state, staged)
        return self._packed(run, column, level)

    def init_state(self, arrived: Any, staged: Staged) -> StagedState:
        """The column's state."""
        return self.with_arrived(self.traced.init, arrived)._init(staged)

    def updates(
        self, arrived: Any, grads: Staged, state: StagedState, staged: Staged
    ) -> tuple[Staged, StagedState]:
        """The column's updates and next state."""
        return self.with_arrived(self.traced.update, arrived)._update(grads, state, staged)

    def step(
        self, arrived: Any, trained: Staged, state: StagedState, grads: Staged, others: Staged
    ) -> tuple[Staged, StagedState]:
        """The column's trained slots and state after the update; `others` are not trained."""
        updates, state = self.updates(arrived, grads, state, {**trained, **others})
        return {n: optax.apply_updates(x, updates[n]) for n, x in trained.items()}, state

    def with_arrived(
        self, program: LeafProgram, arrived: Sequence[Sequence[Vectors]]
    ) -> ColumnOptimizer:
        """This optimizer with exported values, given the vectors of all columns by round."""
        parts: dict[Value, list[Any]] = {}
        for level, columns in zip(export_levels(program), arrived, strict=False):
            for column, vectors in enumerate(columns):
                read = dict.fromkeys(vectors, 0)
                for _, x in self._exported(program, column, level):
                    aval = program.trace.avals[x]
                    start = read[str(aval.dtype)]
                    stop = read[str(aval.dtype)] = start + math.prod(aval.shape)
                    part = vectors[str(aval.dtype)][start:stop].reshape(aval.shape)
                    parts.setdefault(x, []).append(part)
        return replace(self, parts=parts)

    def _share(self, run: OptimizerRounds) -> None:
        run.known.update({x: run.combined(x, parts) for x, parts in self.parts.items()})

    def _packed(self, run: OptimizerRounds, column: int, level: int) -> Vectors:
        """This column's exported values, those of one dtype as one vector."""
        wanted: dict[Weight, list[Value]] = {}
        for weight, x in self._exported(run.program, column, level):
            wanted.setdefault(weight, []).append(x)
        made = run.placed(
            lambda weight: [
                (Component("exported", n), x) for n, x in enumerate(wanted.get(weight, ()))
            ]
        )
        slot_of = {slot.weights[0]: j for j, slot in enumerate(self.placement.slots)}
        flat: dict[str, list[Any]] = {}
        for weight, values in wanted.items():
            for n in range(len(values)):
                array = made[slot_of[weight]][Component("exported", n)]
                flat.setdefault(str(array.dtype), []).append(array.ravel())
        return {dtype: jnp.concatenate(arrays) for dtype, arrays in flat.items()}

    def _exported(
        self, program: LeafProgram, column: int, level: int
    ) -> list[tuple[Weight, Value]]:
        """(weight, value) of all that a column exports in a round, in the order of its vectors."""
        by_leaf: dict[int, list[Value]] = {}
        for x, leaf in program.exported.items():
            if program.levels[x] == level:
                by_leaf.setdefault(leaf, []).append(x)
        return [(w, x) for w in self.exports[column] for x in by_leaf.get(w.leaf, ())]


def export_levels(program: LeafProgram) -> list[int]:
    """Levels of exported values, ascending: one round of exchange between columns for each."""
    return sorted({program.levels[x] for x in program.exported})
