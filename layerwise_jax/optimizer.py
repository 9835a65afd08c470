"""optax on placed parameters: row by row what the optimiser does on the user's own tree.

Run on slots as they are, an optimiser that is not elementwise goes wrong: a global norm counts a tied weight once a
copy, factored moments and trust ratios see (rows, *shape), masks see other paths. So the user's optimiser is traced on
the user's tree (`optimizer_program`), cut by leaves, and each leaf's part is run on the rows where it lives
(`optimizer_rows`). What no leaf owns, such as a step count or a global norm, is computed once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from layerwise_jax.optimizer_program import LeafProgram
from layerwise_jax.optimizer_rows import GRADIENT, PARAMETER, Classifier, Component
from layerwise_jax.optimizer_run import Run
from layerwise_jax.optimizer_trace import TracedOptimizer, trace_optimizer
from layerwise_jax.placement import DATA, STAGE, Placement, Slot, Staged
from layerwise_jax.program import Operand, Value, Weight

ComponentOf = Callable[[Value, Weight], Component | None]


class StagedState(NamedTuple):
    """An optimiser's state, placed as the parameters are.

    Attributes:
      shared: what belongs to no parameter, in the order of the user's state.
      placed: for every slot, the arrays (rows, *shape) of what belongs to the parameters in it.
    """

    shared: tuple[Any, ...]
    placed: dict[str, tuple[Any, ...]]


@dataclass(frozen=True, eq=False)
class StagedOptimizer:
    """An optimiser of the user's tree that takes and gives placed trees; `init` and `update` make it optax's.

    Attributes:
      placement: where the weights live.
      trainable: for every leaf of the user's parameters, whether it is trained.
      mesh: the mesh, with an axis `stage`.
      optimizer: the optimiser of the user's tree, in which leaves that are not trained are `optax.MaskedNode`.
      shard_over_data: whether state is shared out over the replicas of a mesh axis `data`.
    """

    placement: Placement
    trainable: tuple[bool, ...]
    mesh: Mesh
    optimizer: optax.GradientTransformation
    shard_over_data: bool = False

    def init(self, staged: Staged) -> StagedState:
        """The state for placed parameters."""
        self.placement.check_staged(staged)
        return self._jitted_init(staged)

    def update(self, grads: Staged, state: StagedState, staged: Staged | None = None) -> tuple[Staged, StagedState]:
        """Placed updates from placed gradients, zeros for what is not trained, and the next state.

        Raises:
          ValueError: the parameters are missing, or gradients or state are not this optimiser's.
        """
        if staged is None:
            raise ValueError("The optimiser got no parameters. Call update(gradients, state, placed_parameters).")
        self._check_state(state)
        if not isinstance(grads, dict) or not set(grads) <= {slot.name for slot in self.placement.slots}:
            raise ValueError(
                "These are no placed gradients of this optimiser's pipeline. Take those of pipeline.value_and_grad, or "
                "place them with pipeline.place."
            )
        # float0 cannot enter a jitted function.
        floating = {name: grad for name, grad in grads.items() if grad.dtype != jax.dtypes.float0}
        return self._jitted_update(floating, state, staged)

    def gather_state(self, state: StagedState) -> Any:
        """The state that the optimiser has for the user's tree, a copy: see `place_state`.

        Raises:
          ValueError: the state is not this optimiser's.
        """
        self._check_state(state)
        shared, homes = map(jnp.copy, state.shared), self._homes
        leaves = []
        for position, leaf in enumerate(self.traced.state_owners):
            if leaf is None:
                leaves.append(next(shared))
                continue
            parts = []
            for weight, slot, row in homes[leaf]:
                index = self._layout[slot].index(self._state_component(position, weight))
                parts.append((weight.start or 0, state.placed[self.placement.slots[slot].name][index][row]))
            rows = [part for _, part in sorted(parts, key=lambda part: part[0])]
            leaves.append(rows[0] if len(rows) == 1 else jnp.concatenate(rows))
        return jax.tree.unflatten(self.traced.state_tree, leaves)

    def place_state(self, state: Any) -> StagedState:
        """The inverse of `gather_state`, which also takes the state of an unstaged run or of other stages.

        Raises:
          ValueError: this is not a state of the optimiser for the trained part of the user's tree.
        """
        leaves, tree = jax.tree.flatten(state)
        if tree != self.traced.state_tree:
            raise ValueError(
                f"The optimiser's state has another tree.\n  came:   {tree}\n  wanted: {self.traced.state_tree}\n"
                "Pass the state that this optimiser has for the trained part of the parameters."
            )
        owners = self.traced.state_owners
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        # Copies: what a training step is given is donated, and the user's own state must stay.
        own = [x for x, owner in zip(leaves, owners, strict=True) if owner is None]
        shared = [jax.device_put(jnp.copy(x), everywhere) for x in own]
        placed = {
            slot.name: tuple(self._filled(slot, component, leaves) for component in self._layout[j])
            for j, slot in enumerate(self.placement.slots)
        }
        return StagedState(tuple(shared), placed)

    def _check_state(self, state: Any) -> None:
        """Refuse what neither `init` nor `place_state` of this optimiser has made."""
        wanted = {slot.name: len(layout) for slot, layout in zip(self.placement.slots, self._layout, strict=True)}
        if isinstance(state, StagedState):
            came = {name: len(arrays) for name, arrays in state.placed.items()}
            if came == wanted and len(state.shared) == self.traced.state_owners.count(None):
                return
            what = "the state of another optimiser or pipeline"
        else:
            what = type(state).__name__
        raise ValueError(
            f"The optimiser's state came as {what}. Call init(placed_parameters), or place_state(state) with that of "
            "an unstaged run."
        )

    @property
    def trained_slots(self) -> tuple[str, ...]:
        """The names of the slots that hold a trained weight."""
        weights = ((slot.name, w) for slot in self.placement.slots for w in slot.weights if w is not None)
        return tuple(dict.fromkeys(name for name, weight in weights if self.trainable[weight.leaf]))

    @cached_property
    def _jitted_init(self) -> Callable[[Staged], StagedState]:
        return jax.jit(self._init)

    @cached_property
    def _jitted_update(self) -> Callable[[Staged, StagedState, Staged], tuple[Staged, StagedState]]:
        return jax.jit(self._update)

    def _filled(self, slot: Slot, component: Component, leaves: Sequence[Any]) -> Any:
        """An array of a slot's state from the leaves of the user's state, put together on the host."""
        array = np.zeros((len(slot.weights), *component.shape), component.dtype)
        for row, weight in enumerate(slot.weights):
            for position in self._positions.get(weight.leaf, ()) if weight else ():
                if weight and self._state_component(position, weight) == component:
                    array[row] = weight.of(leaves[position])
        return jax.device_put(array, self._sharding(array.shape))

    def _init(self, staged: Staged) -> StagedState:
        program = self.traced.init
        arrays = [{PARAMETER: staged[slot.name]} for slot in self.placement.slots]
        inputs = frozenset(program.trace.inputs)
        run = self._run(program, lambda x, _: PARAMETER if x in inputs else None, arrays, {})
        outputs = program.trace.outputs
        return self._next_state(run, outputs, run.placed(self._wanted_state(outputs)))

    def _update(self, grads: Staged, state: StagedState, staged: Staged) -> tuple[Staged, StagedState]:
        traced, trained = self.traced, len(self.traced.leaves)
        trace = traced.update.trace
        gradients, states = trace.inputs[:trained], trace.inputs[trained:-trained]
        kinds = dict.fromkeys(gradients, GRADIENT) | dict.fromkeys(trace.inputs[-trained:], PARAMETER)
        position_of = {x: position for position, x in enumerate(states)}

        def component_of(x: Value, weight: Weight) -> Component | None:
            return self._state_component(position_of[x], weight) if x in position_of else kinds.get(x)

        shared = [x for x, owner in zip(states, traced.state_owners, strict=True) if owner is None]
        arrays = [self._arrays(j, grads, state, staged) for j in range(len(self.placement.slots))]
        run = self._run(traced.update, component_of, arrays, dict(zip(shared, state.shared, strict=True)))
        updates, next_state = dict(zip(traced.leaves, trace.outputs[:trained], strict=True)), trace.outputs[trained:]
        wanted_state = self._wanted_state(next_state)

        def wanted(weight: Weight) -> list[tuple[Component, Operand]]:
            own = [(GRADIENT, updates[weight.leaf])] if weight.leaf in updates else []
            return own + wanted_state(weight)

        made = run.placed(wanted)
        placed = {slot.name: self._updates(j, made[j], staged) for j, slot in enumerate(self.placement.slots)}
        return placed, self._next_state(run, next_state, made)

    def _run(
        self, program: LeafProgram, component_of: ComponentOf, arrays: Sequence[Mapping], known: Mapping[Value, Any]
    ) -> Run:
        """A run of a traced function, with all that is shared already computed."""
        classifier = Classifier(program, self.placement.signature.params_names, component_of)
        run = Run(program, self.placement, self.mesh, classifier, arrays, {**program.trace.constants, **known})
        run.exports()
        return run

    def _wanted_state(self, outputs: Sequence[Operand]) -> Callable[[Weight], list[tuple[Component, Operand]]]:
        return lambda weight: [
            (self._state_component(position, weight), outputs[position])
            for position in self._positions.get(weight.leaf, ())
        ]

    def _next_state(self, run: Run, outputs: Sequence[Operand], made: Sequence[Mapping[Component, Any]]) -> StagedState:
        shared = [x for x, owner in zip(outputs, self.traced.state_owners, strict=True) if owner is None]
        placed = {
            slot.name: tuple(
                lax.with_sharding_constraint(x, self._sharding(x.shape))
                for x in (made[j][component] for component in self._layout[j])
            )
            for j, slot in enumerate(self.placement.slots)
        }
        return StagedState(tuple(jnp.asarray(run.shared(x)) for x in shared), placed)

    def _arrays(self, slot: int, grads: Staged, state: StagedState, staged: Staged) -> dict[Component, Any]:
        name = self.placement.slots[slot].name
        arrays = dict(zip(self._layout[slot], state.placed[name], strict=True)) | {PARAMETER: staged[name]}
        return arrays | ({GRADIENT: grads[name]} if name in grads else {})

    def _updates(self, slot: int, made: Mapping[Component, Any], staged: Staged) -> Any:
        held = staged[self.placement.slots[slot].name]
        update = made.get(GRADIENT, None)
        if update is None:
            return jnp.zeros(held.shape, held.dtype)
        return lax.with_sharding_constraint(update, NamedSharding(self.mesh, PartitionSpec(STAGE)))

    def _sharding(self, shape: tuple[int, ...]) -> NamedSharding:
        """Rows of state over the stages and, if asked for, the first axis that divides over the replicas."""
        spec: list[str | None] = [STAGE]
        if self.shard_over_data and DATA in self.mesh.axis_names:
            axis = next((i for i, size in enumerate(shape) if i and size % self.mesh.shape[DATA] == 0), 0)
            spec += [None] * (axis - 1) + [DATA] if axis else []
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    @cached_property
    def traced(self) -> TracedOptimizer:
        """The optimiser on the user's tree."""
        return trace_optimizer(self.placement, self.trainable, self.optimizer)

    @cached_property
    def _positions(self) -> dict[int, list[int]]:
        """The positions in the user's state of what belongs to each trained leaf."""
        positions: dict[int, list[int]] = {leaf: [] for leaf in self.traced.leaves}
        for position, leaf in enumerate(self.traced.state_owners):
            if leaf is not None:
                positions[leaf].append(position)
        return positions

    @cached_property
    def _homes(self) -> dict[int, list[tuple[Weight, int, int]]]:
        """(weight, slot, row) of the first copy of every weight, by leaf."""
        homes: dict[int, list[tuple[Weight, int, int]]] = {}
        for weight, ((slot, row), *_) in self.placement.copies().items():
            homes.setdefault(weight.leaf, []).append((weight, slot, row))
        return homes

    @cached_property
    def _ordinals(self) -> dict[int, int]:
        """Which of its leaf's state of equal type each position is."""
        seen: Counter[tuple] = Counter()
        ordinals = {}
        for position, leaf in enumerate(self.traced.state_owners):
            aval = self.traced.state_avals[position]
            key = leaf, aval.shape, aval.dtype
            ordinals[position] = seen[key]
            seen[key] += 1
        return ordinals

    def _state_component(self, position: int, weight: Weight) -> Component:
        """The array of a slot that holds this part of the user's state for a weight."""
        aval = self.traced.state_avals[position]
        shape = aval.shape
        if weight.start is not None and weight.stop is not None and shape:
            shape = (weight.stop - weight.start, *shape[1:])
        return Component("state", self._ordinals[position], shape, aval.dtype)

    @cached_property
    def _layout(self) -> list[list[Component]]:
        """The components of every slot's state."""
        return [
            list(
                dict.fromkeys(
                    self._state_component(position, weight)
                    for weight in slot.weights
                    if weight is not None
                    for position in self._positions.get(weight.leaf, ())
                )
            )
            for slot in self.placement.slots
        ]


def stage_optimizer(
    placement: Placement,
    trainable: Sequence[bool],
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    *,
    shard_over_data: bool = False,
) -> StagedOptimizer:
    """An optax optimiser of the user's tree as one of placed trees.

    Args:
      placement: where the weights live.
      trainable: for every leaf of the user's parameters, whether it is trained.
      mesh: the mesh, with an axis `stage`.
      optimizer: what optax makes: any chain. Where parameters meet, they may meet in scalars only.
      shard_over_data: share state out over the replicas of the mesh axis `data` (ZeRO-1, arXiv:1910.02054).

    Raises:
      ValueError: nothing is trained, or the optimiser lets large values of several parameters meet.
    """
    if not all(callable(getattr(optimizer, name, None)) for name in ("init", "update")):
        raise ValueError(
            f"The optimiser came as {type(optimizer).__name__}; what optax makes is wanted, with init and update: "
            "optax.adam(1e-3), say."
        )
    if not any(trainable):
        raise ValueError("No parameter is trained, so that there is nothing to optimise. Freeze fewer parameters.")
    staged = StagedOptimizer(placement, tuple(trainable), mesh, optimizer, shard_over_data)
    assert staged.traced.leaves
    return staged
