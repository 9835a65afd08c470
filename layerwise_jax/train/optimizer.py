"""Optax on placed parameters: shard by shard the same update as on the user's own tree.

An optimizer that is not elementwise is wrong on slots as they are: a global norm would count tied
weights once per copy, factored moments and trust ratios would see (shards, *shape), and masks would
see other paths. So the optimizer is traced on the user's tree (`optimizer_trace`) and cut by leaves
(`leaf_program`). Each leaf's part runs on the shards that hold it (`slot_update`), and so does its
state (`state`). Values of no leaf, such as a step count or a global norm, are computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from layerwise_jax._jax import no_context_mesh
from layerwise_jax.mesh import STAGE
from layerwise_jax.stage.placement import Placement, Staged
from layerwise_jax.trace.program import Operand, Value, Weight
from layerwise_jax.train.leaf_program import LeafProgram
from layerwise_jax.train.optimizer_trace import TracedOptimizer, trace_optimizer
from layerwise_jax.train.rounds import OptimizerRounds
from layerwise_jax.train.slot_update import GRADIENT, PARAMETER, Classifier, Component
from layerwise_jax.train.state import StagedState, StateLayout

ComponentOf = Callable[[Value, Weight], Component | None]


@dataclass(frozen=True, eq=False)
class StagedOptimizer:
    """Optax optimizer of placed trees, with optax's `init` and `update`.

    Attributes:
      placement: placement of the weights.
      trainable: whether each leaf of the user's parameters is trained.
      mesh: mesh with an axis `stage`.
      optimizer: optimizer of the user's tree; untrained leaves are `optax.MaskedNode` there.
      shard_over_data: whether state is sharded over the replicas of a mesh axis `data`.
    """

    placement: Placement
    trainable: tuple[bool, ...]
    mesh: Mesh
    optimizer: optax.GradientTransformation
    shard_over_data: bool = False

    @no_context_mesh()
    def init(self, staged: Staged) -> StagedState:
        """Initial state for placed parameters."""
        self.placement.check_staged(staged)
        return self._jitted_init(staged)

    @no_context_mesh()
    def update(
        self, grads: Staged, state: StagedState, staged: Staged | None = None
    ) -> tuple[Staged, StagedState]:
        """Placed updates, zeros for untrained weights, and the next state.

        Raises:
          ValueError: the parameters are missing, or gradients or state belong to another pipeline
            or optimizer.
        """
        placed, floating = self._checked(grads, state, staged)
        return self._jitted_update(floating, state, placed)

    def _checked(self, grads: Any, state: Any, staged: Staged | None) -> tuple[Staged, Staged]:
        """The parameters, and the gradients but for those of dtype float0, if all are this
        optimizer's. A jitted function does not take float0.
        """
        if staged is None:
            raise ValueError(
                "staged must be the placed parameters, got None. Call update(gradients, state, "
                "placed_parameters)."
            )
        self._layout.check(state)
        if not isinstance(grads, dict) or not set(grads) <= {
            slot.name for slot in self.placement.slots
        }:
            raise ValueError(
                "grads must be placed gradients of this optimizer's pipeline, got "
                f"{_keys_of(grads)}. Pass those of pipeline.value_and_grad, or place a tree of "
                "gradients with pipeline.place."
            )
        return staged, {n: grad for n, grad in grads.items() if grad.dtype != jax.dtypes.float0}

    def gather_state(self, state: StagedState) -> Any:
        """State of the user's tree, a copy; the inverse of `place_state`.

        Raises:
          ValueError: the state belongs to another optimizer or pipeline.
        """
        return self._layout.gather(state)

    def place_state(self, state: Any) -> StagedState:
        """Placed state from the state of the user's tree, of an unstaged run or of other stages.

        Raises:
          ValueError: the state has another tree than the optimizer's for the trained parameters.
        """
        return self._layout.place(state)

    @property
    def trained_slots(self) -> tuple[str, ...]:
        """Names of the slots that hold a trained weight."""
        slots = self.placement.slots
        held = [(slot.name, w) for slot in slots for w in slot.weights if w and not w.is_captured]
        return tuple(dict.fromkeys(name for name, weight in held if self.trainable[weight.leaf]))

    @cached_property
    def _jitted_init(self) -> Callable[[Staged], StagedState]:
        return jax.jit(self._init)

    @cached_property
    def _jitted_update(self) -> Callable[[Staged, StagedState, Staged], tuple[Staged, StagedState]]:
        return jax.jit(self._update)

    def _init(self, staged: Staged) -> StagedState:
        run, outputs = self._rounds_of_init(staged), self.traced.init.trace.outputs
        return self._layout.state_of(run, outputs, run.placed(self._layout.wanted(outputs)))

    def _rounds_of_init(self, staged: Staged) -> OptimizerRounds:
        """A run of the traced `init`."""
        program = self.traced.init
        arrays = [{PARAMETER: staged[slot.name]} for slot in self.placement.slots]
        inputs = frozenset(program.trace.inputs)
        return self._run(program, lambda x, _: PARAMETER if x in inputs else None, arrays, {})

    def _update(
        self, grads: Staged, state: StagedState, staged: Staged
    ) -> tuple[Staged, StagedState]:
        run = self._rounds_of_update(grads, state, staged)
        traced = self.traced
        layout = self._layout
        trained = len(traced.leaves)
        trace = traced.update.trace  # outputs: updates, state
        updates = dict(zip(traced.leaves, trace.outputs[:trained], strict=True))
        next_state = trace.outputs[trained:]
        wanted_state = layout.wanted(next_state)

        def wanted(weight: Weight) -> list[tuple[Component, Operand]]:
            own = [(GRADIENT, updates[weight.leaf])] if weight.leaf in updates else []
            return own + wanted_state(weight)

        made = run.placed(wanted)
        placed = {
            slot.name: self._updates(j, made[j], staged)
            for j, slot in enumerate(self.placement.slots)
        }
        return placed, layout.state_of(run, next_state, made)

    def _rounds_of_update(
        self, grads: Staged, state: StagedState, staged: Staged
    ) -> OptimizerRounds:
        """A run of the traced `update`."""
        traced, trained, layout = self.traced, len(self.traced.leaves), self._layout
        trace = traced.update.trace
        gradients, states = trace.inputs[:trained], trace.inputs[trained:-trained]
        kinds = dict.fromkeys(gradients, GRADIENT) | dict.fromkeys(
            trace.inputs[-trained:], PARAMETER
        )
        position_of = {x: position for position, x in enumerate(states)}

        def component_of(x: Value, weight: Weight) -> Component | None:
            return layout.component(position_of[x], weight) if x in position_of else kinds.get(x)

        arrays = [self._arrays(j, grads, state, staged) for j in range(len(self.placement.slots))]
        return self._run(traced.update, component_of, arrays, layout.known(states, state))

    def _run(
        self,
        program: LeafProgram,
        component_of: ComponentOf,
        arrays: Sequence[Mapping],
        known: Mapping[Value, Any],
    ) -> OptimizerRounds:
        """Run of a traced function in which the shared values are computed already."""
        classifier = Classifier(program, self.placement.signature.params_names, component_of)
        run = OptimizerRounds(
            program,
            self.placement,
            self.mesh,
            classifier,
            arrays,
            {**program.trace.constants, **known},
        )
        self._share(run)
        return run

    def _share(self, run: OptimizerRounds) -> None:
        """Compute what parameters share, before anything that reads it."""
        run.exports()

    def _arrays(
        self, slot: int, grads: Staged, state: StagedState, staged: Staged
    ) -> dict[Component, Any]:
        name = self.placement.slots[slot].name
        arrays = self._layout.arrays(slot, state) | {PARAMETER: staged[name]}
        return arrays | ({GRADIENT: grads[name]} if name in grads else {})

    def _updates(self, slot: int, made: Mapping[Component, Any], staged: Staged) -> Any:
        held = staged[self.placement.slots[slot].name]
        update = made.get(GRADIENT, None)
        if update is None:
            return jnp.zeros(held.shape, held.dtype)
        return lax.with_sharding_constraint(update, NamedSharding(self.mesh, PartitionSpec(STAGE)))

    @cached_property
    def traced(self) -> TracedOptimizer:
        """Trace of the optimizer on the user's tree."""
        return trace_optimizer(self.placement, self.trainable, self.optimizer)

    @cached_property
    def _layout(self) -> StateLayout:
        return StateLayout(self.placement, self.traced, self.mesh, self.shard_over_data)


@no_context_mesh()
def stage_optimizer(
    placement: Placement,
    trainable: Sequence[bool],
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    *,
    shard_over_data: bool = False,
) -> StagedOptimizer:
    """Optimizer of placed trees from an optax optimizer of the user's tree.

    Args:
      placement: placement of the weights.
      trainable: whether each leaf of the user's parameters is trained.
      mesh: mesh with an axis `stage`.
      optimizer: any optax chain that combines parameters in small values only (a global norm).
      shard_over_data: shard the state over the replicas of the mesh axis `data` (ZeRO-1,
        arXiv:1910.02054).

    Raises:
      ValueError: nothing is trained, or the optimizer combines large values of several parameters.
    """
    check_optimizer(optimizer, trainable)
    staged = StagedOptimizer(placement, tuple(trainable), mesh, optimizer, shard_over_data)
    assert staged.traced.leaves
    return staged


def check_optimizer(optimizer: Any, trainable: Sequence[bool]) -> None:
    """Refuse what optax has not made, and a tree of which nothing is trained.

    Raises:
      ValueError: naming the one or the other.
    """
    if not all(callable(getattr(optimizer, name, None)) for name in ("init", "update")):
        raise ValueError(
            "optimizer must be an optax GradientTransformation with init and update, got "
            f"{type(optimizer).__name__}. Pass optax.adam(1e-3), for example."
        )
    if not any(trainable):
        raise ValueError(
            "trainable must have at least one True, got none. Freeze fewer parameters."
        )


def _keys_of(tree: Any) -> str:
    """Description of a tree for a message: its keys if it is a dict, else its type."""
    return f"a dict of {sorted(map(str, tree))}" if isinstance(tree, dict) else type(tree).__name__
