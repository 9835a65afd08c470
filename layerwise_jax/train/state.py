"""Optimizer state on stages: state of a parameter is placed with it, the rest is replicated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from layerwise_jax import processes
from layerwise_jax._jax import key_paths
from layerwise_jax.mesh import DATA, STAGE
from layerwise_jax.stage.placement import Placement, Slot
from layerwise_jax.trace.program import Operand, Value, Weight
from layerwise_jax.train.optimizer_trace import TracedOptimizer
from layerwise_jax.train.rounds import OptimizerRounds
from layerwise_jax.train.slot_update import Component


class StagedState(NamedTuple):
    """Placed state of an optimizer.

    Attributes:
      shared: replicated state that belongs to no parameter, in the order of the user's state.
      placed: arrays [shards, *shape] of the parameters' state, by slot name.
    """

    shared: tuple[Any, ...]
    placed: dict[str, tuple[Any, ...]]


@dataclass(frozen=True, eq=False)
class StateLayout:
    """Layout of an optimizer's state: the arrays of every slot, and their part of the user's state.

    Attributes:
      placement: placement of the weights.
      traced: the optimizer, traced on the user's tree.
      mesh: mesh with an axis `stage`.
      shard_over_data: whether state is sharded over the replicas of a mesh axis `data`.
    """

    placement: Placement
    traced: TracedOptimizer
    mesh: Mesh
    shard_over_data: bool

    def component(self, position: int, weight: Weight) -> Component:
        """Component of a slot that holds this leaf of the user's state for this weight."""
        aval = self.traced.state_avals[position]
        shape = aval.shape
        if weight.start is not None and weight.stop is not None and shape:
            shape = (weight.stop - weight.start, *shape[1:])
        return Component("state", self._ordinals[position], shape, aval.dtype)

    @cached_property
    def components(self) -> list[list[Component]]:
        """State components of every slot."""
        return [
            list(
                dict.fromkeys(
                    self.component(position, weight)
                    for weight in slot.weights
                    if weight is not None
                    for position in self._positions.get(weight.leaf, ())
                )
            )
            for slot in self.placement.slots
        ]

    @property
    def shared(self) -> list[int]:
        """Positions of the state leaves that belong to no parameter."""
        return [position for position, leaf in enumerate(self.traced.state_owners) if leaf is None]

    def check(self, state: Any) -> None:
        """Check that a state was placed by this layout.

        Raises:
          ValueError: the state belongs to another optimizer or pipeline.
        """
        expected = {
            slot.name: len(layout)
            for slot, layout in zip(self.placement.slots, self.components, strict=True)
        }
        if isinstance(state, StagedState):
            given = {name: len(arrays) for name, arrays in state.placed.items()}
            if given == expected and len(state.shared) == len(self.shared):
                return
            what = "the state of another optimizer or pipeline"
        else:
            what = type(state).__name__
        raise ValueError(
            f"state must be a placed state of this optimizer, got {what}. Call "
            "init(placed_parameters), or place_state(state) with the state of an unstaged run."
        )

    def gather(self, state: StagedState) -> Any:
        """State of the user's tree, a copy."""
        self.check(state)
        if processes.is_partial(state):
            return processes.compute(self._gathered, self.mesh, state)
        return self._gathered(state)

    def _gathered(self, state: StagedState) -> Any:
        shared = map(jnp.copy, state.shared)
        homes = self._homes
        leaves = []
        for position, leaf in enumerate(self.traced.state_owners):
            if leaf is None:
                leaves.append(next(shared))
                continue
            parts = []
            for weight, slot, row in homes[leaf]:
                index = self.components[slot].index(self.component(position, weight))
                parts.append(
                    (weight.start or 0, state.placed[self.placement.slots[slot].name][index][row])
                )
            rows = [part for _, part in sorted(parts, key=lambda part: part[0])]
            leaves.append(rows[0] if len(rows) == 1 else jnp.concatenate(rows))
        return jax.tree.unflatten(self.traced.state_tree, leaves)

    def place(self, state: Any) -> StagedState:
        """Placed state from a state of the user's tree; the inverse of `gather`."""
        paths, leaves, tree = key_paths(state)
        if tree != self.traced.state_tree:
            raise ValueError(
                "state must have the tree of this optimizer's state for the trained parameters, "
                f"got another: {_difference(paths, self.traced.state_paths)}. Pass the state of "
                "the same optimizer."
            )
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        if processes.is_partial(leaves):
            shardings = StagedState(
                (everywhere,) * len(self.shared),
                {
                    slot.name: tuple(
                        self.sharding((len(slot.weights), *c.shape)) for c in self.components[j]
                    )
                    for j, slot in enumerate(self.placement.slots)
                },
            )
            return processes.compute(
                partial(self._placed, jnp), self.mesh, leaves, shardings=shardings
            )
        found = self._placed(np, leaves)
        # Copies: what a training step is given is donated, and the user's own state must stay.
        shared = tuple(jax.device_put(jnp.copy(x), everywhere) for x in found.shared)
        placed = {
            name: tuple(jax.device_put(x, self.sharding(x.shape)) for x in arrays)
            for name, arrays in found.placed.items()
        }
        return StagedState(shared, placed)

    def _placed(self, xp: Any, leaves: Sequence[Any]) -> StagedState:
        """The state's arrays from the leaves of the user's state, made by numpy or jax.numpy."""
        placed = {
            slot.name: tuple(self._filled(xp, slot, c, leaves) for c in self.components[j])
            for j, slot in enumerate(self.placement.slots)
        }
        return StagedState(tuple(leaves[position] for position in self.shared), placed)

    def wanted(
        self, outputs: Sequence[Operand]
    ) -> Callable[[Weight], list[tuple[Component, Operand]]]:
        """Components that a weight's shard computes, with their values.

        Args:
          outputs: the program's outputs for the user's state.
        """
        return lambda weight: [
            (self.component(position, weight), outputs[position])
            for position in self._positions.get(weight.leaf, ())
        ]

    def known(self, inputs: Sequence[Value], state: StagedState) -> dict[Value, Any]:
        """Replicated state by value: the program's inputs for the user's state."""
        return dict(zip([inputs[position] for position in self.shared], state.shared, strict=True))

    def arrays(self, slot: int, state: StagedState) -> dict[Component, Any]:
        """State arrays of a slot by component."""
        held = state.placed[self.placement.slots[slot].name]
        return dict(zip(self.components[slot], held, strict=True))

    def state_of(
        self,
        run: OptimizerRounds,
        outputs: Sequence[Operand],
        made: Sequence[Mapping[Component, Any]],
    ) -> StagedState:
        """State computed by a run.

        Args:
          run: the run.
          outputs: the program's outputs for the user's state.
          made: components computed by every slot.
        """
        placed = {
            slot.name: tuple(
                lax.with_sharding_constraint(x, self.sharding(x.shape))
                for x in (made[j][component] for component in self.components[j])
            )
            for j, slot in enumerate(self.placement.slots)
        }
        return StagedState(
            tuple(jnp.asarray(run.shared(outputs[position])) for position in self.shared), placed
        )

    def _filled(self, xp: Any, slot: Slot, component: Component, leaves: Sequence[Any]) -> Any:
        """State array [shards, *shape] of a slot, from the leaves of the user's state."""
        rows = [xp.zeros(component.shape, component.dtype)] * len(slot.weights)
        for row, weight in enumerate(slot.weights):
            for position in self._positions.get(weight.leaf, ()) if weight else ():
                if weight and self.component(position, weight) == component:
                    rows[row] = xp.asarray(weight.of(leaves[position]), component.dtype)
        return xp.stack(rows)

    def sharding(self, shape: tuple[int, ...]) -> NamedSharding:
        """Sharding of a state array [shards, ...]: shards over the stages.

        With `shard_over_data` the first other axis that the replicas divide is sharded over them.
        """
        spec: list[str | None] = [STAGE]
        if self.shard_over_data and DATA in self.mesh.axis_names:
            axis = next(
                (i for i, size in enumerate(shape) if i and size % self.mesh.shape[DATA] == 0), 0
            )
            spec += [None] * (axis - 1) + [DATA] if axis else []
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    @cached_property
    def _positions(self) -> dict[int, list[int]]:
        """Positions in the user's state of each trained leaf's state."""
        positions: dict[int, list[int]] = {leaf: [] for leaf in self.traced.leaves}
        for position, leaf in enumerate(self.traced.state_owners):
            if leaf is not None:
                positions[leaf].append(position)
        return positions

    @cached_property
    def _homes(self) -> dict[int, list[tuple[Weight, int, int]]]:
        """(weight, slot, shard) of the first copy of every weight, by leaf."""
        homes: dict[int, list[tuple[Weight, int, int]]] = {}
        for weight, ((slot, row), *_) in self.placement.copies().items():
            homes.setdefault(weight.leaf, []).append((weight, slot, row))
        return homes

    @cached_property
    def _ordinals(self) -> dict[int, int]:
        """Number of each position among its leaf's state of equal shape and dtype."""
        seen: Counter[tuple] = Counter()
        ordinals = {}
        for position, leaf in enumerate(self.traced.state_owners):
            aval = self.traced.state_avals[position]
            key = leaf, aval.shape, aval.dtype
            ordinals[position] = seen[key]
            seen[key] += 1
        return ordinals


def _difference(given: Sequence[Any], expected: Sequence[Any]) -> str:
    """Paths that only one of two trees has; for equal paths, that the trees' nodes differ."""
    given_names, expected_names = (
        {jax.tree_util.keystr(path) for path in x} for x in (given, expected)
    )
    if given_names == expected_names:
        return "the same leaves in other nodes, or other empty nodes"
    parts = {
        "missing": sorted(expected_names - given_names),
        "unexpected": sorted(given_names - expected_names),
    }
    return "; ".join(f"{word} {', '.join(names)}" for word, names in parts.items() if names)
