"""optax on parameters placed for executor `host`: a program per column, small values exchanged.

What crosses parameters (a global norm, whether all gradients are finite) is computed where each
parameter lives, packed into one vector per dtype and column, and sent to every column, which then
runs the shared operations of the trace in their order. So all columns have equal bits. Without such
values a column's update waits for no other column.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from layerwise_jax._jax import Tracer
from layerwise_jax.host.placement import HostPlacement, HostStaged
from layerwise_jax.processes import copies_on, joined_copies
from layerwise_jax.stage.placement import Staged
from layerwise_jax.trace.program import Weight
from layerwise_jax.train.column_optimizer import ColumnOptimizer, export_levels
from layerwise_jax.train.leaf_program import LeafProgram
from layerwise_jax.train.optimizer import StagedOptimizer, check_optimizer
from layerwise_jax.train.state import StagedState

EVERYWHERE = PartitionSpec()


@dataclass(frozen=True, eq=False)
class HostOptimizer(StagedOptimizer):
    """An optimizer of the user's tree for parameters placed for executor `host`.

    Call it without `jit`. `init`, `update`, `gather_state` and `place_state` are those of
    `StagedOptimizer`.
    """

    @property
    def meshes(self) -> Sequence[Any]:
        """The sub-mesh of every column."""
        assert isinstance(self.placement, HostPlacement)
        return self.placement.meshes

    @cached_property
    def columns(self) -> tuple[ColumnOptimizer, ...]:
        """The optimizer of every column."""
        placement = self.placement
        assert isinstance(placement, HostPlacement)
        homes: list[list[Weight]] = [[] for _ in placement.meshes]
        # First copy of each weight: a tied weight's values are exported once.
        for weight, ((slot, _), *_) in placement.copies().items():
            homes[placement.column_of[slot]].append(weight)
        exports = tuple(map(tuple, homes))
        return tuple(
            ColumnOptimizer(
                placement=own,
                trainable=self.trainable,
                mesh=mesh,
                optimizer=self.optimizer,
                shard_over_data=self.shard_over_data,
                whole=self.traced,
                exports=exports,
            )
            for own, mesh in zip(placement.of_column, placement.meshes, strict=True)
        )

    def init(self, staged: Staged) -> StagedState:
        self.placement.check_staged(staged)
        arguments = [(self._own(staged, c),) for c in range(len(self.columns))]
        # Small values that cross columns (a global norm) first, then every column by itself.
        arrived = self._exchange(self.traced.init, "export_of_init", arguments)
        made = [self._jit("init_state", c)(arrived[c], *own) for c, own in enumerate(arguments)]
        return self._joined(made)

    def update(
        self, grads: Staged, state: StagedState, staged: Staged | None = None
    ) -> tuple[Staged, StagedState]:
        placed, floating = self._checked(grads, state, staged)
        arguments = [
            (self._own(floating, c), self._state_on(state, c), self._own(placed, c))
            for c in range(len(self.columns))
        ]
        arrived = self._exchange(self.traced.update, "export_of_update", arguments)
        made = [self._jit("updates", c)(arrived[c], *own) for c, own in enumerate(arguments)]
        updates = {name: x for own, _ in made for name, x in own.items()}
        return HostStaged(updates), self._joined([own for _, own in made])

    def apply(
        self, grads: Staged, state: StagedState, staged: Staged
    ) -> tuple[HostStaged, StagedState]:
        """Parameters and state after the update. All three arguments are donated."""
        placed, floating = self._checked(grads, state, staged)
        trained = set(self.trained_slots)
        arguments = []
        for c in range(len(self.columns)):
            own = self._own(placed, c)
            arguments.append((self._own(floating, c), self._state_on(state, c), own))
        arrived = self._exchange(self.traced.update, "export_of_update", arguments)
        made = []
        for c, (own_grads, own_state, own) in enumerate(arguments):
            # Untrained slots are passed without donation: the result holds them again.
            moving = {name: x for name, x in own.items() if name in trained}
            others = {name: x for name, x in own.items() if name not in trained}
            step = self._jit("step", c, donated=(1, 2))
            made.append(step(arrived[c], moving, own_state, own_grads, others))
        moved = {name: x for own, _ in made for name, x in own.items()}
        return HostStaged({**staged, **moved}), self._joined([own for _, own in made])

    def gather_state(self, state: StagedState) -> Any:
        self._layout.check(state)
        if any(isinstance(x, Tracer) for x in jax.tree.leaves(state)):
            return self._layout.gather(state)
        # On the host: the columns' arrays are on different devices and cannot meet in one program.
        placed = {name: tuple(map(np.asarray, arrays)) for name, arrays in state.placed.items()}
        return self._layout.gather(StagedState(state.shared, placed))

    def place_state(self, state: Any) -> StagedState:
        return self._joined([column._layout.place(state) for column in self.columns])

    def _exchange(
        self, program: LeafProgram, name: str, arguments: Sequence[tuple[Any, ...]]
    ) -> list[list[Any]]:
        """Exchange exported values between columns, one round for each level.

        Returns:
          For every column, the vectors of all columns by round, on the column's devices.
        """
        arrived: list[list[Any]] = [[] for _ in arguments]
        for level in export_levels(program):
            made = [
                self._jit(name, c, c, level)(arrived[c], *own) for c, own in enumerate(arguments)
            ]
            for c, mesh in enumerate(self.meshes):
                # One vector per dtype and column, copied to every column's devices.
                arrived[c].append(jax.device_put(made, NamedSharding(mesh, EVERYWHERE)))
        return arrived

    def _jit(
        self, name: str, column: int, *static: int, donated: tuple[int, ...] = ()
    ) -> Callable[..., Any]:
        """A method of a column's optimizer, jitted once."""
        key = (name, column, *static)
        if key not in self._jitted:
            own = self.columns[column]
            out = (
                own.state_shardings if name == "init_state" else (own.on_stage, own.state_shardings)
            )
            # Results have the shardings of the arguments, so that no later step compiles again.
            shardings = own.everywhere if static else out
            # Static arguments (column, level) choose the program; there is one a round.
            run = partial(getattr(own, name), *static)
            self._jitted[key] = jax.jit(run, donate_argnums=donated, out_shardings=shardings)
        return self._jitted[key]

    @cached_property
    def _jitted(self) -> dict[tuple[Any, ...], Callable[..., Any]]:
        return {}

    def _own(self, placed: Staged, column: int) -> Staged:
        names = [slot.name for slot in self.columns[column].placement.slots]
        return {name: placed[name] for name in names if name in placed}

    def _state_on(self, state: StagedState, column: int) -> StagedState:
        """A column's part of the state; what is shared is there already, so nothing is copied."""
        shared = tuple(copies_on(x, self.meshes[column]) for x in state.shared)
        return StagedState(shared, self._own(state.placed, column))

    def _joined(self, states: Sequence[StagedState]) -> StagedState:
        """The state of all columns; each has computed what is shared, with equal bits."""
        columns = [NamedSharding(mesh, EVERYWHERE) for mesh in self.meshes]
        shared = []
        for copies in zip(*(state.shared for state in states), strict=True):
            # A program without arguments (a count's first value) runs on the default device.
            held = [jax.device_put(x, own) for x, own in zip(copies, columns, strict=True)]
            shared.append(joined_copies(held, self.mesh))
        placed = {name: x for state in states for name, x in state.placed.items()}
        return StagedState(tuple(shared), placed)


class Trains(Protocol):
    """Pipeline interface that a training step uses: the staged program and `value_and_grad`."""

    @property
    def loop(self) -> Any: ...

    def value_and_grad(self, staged: Staged, *inputs: Any) -> tuple[Any, Staged]: ...


@dataclass(frozen=True, eq=False)
class HostTrainStep:
    """One step of training by executor `host`; call it without `jit`.

    Attributes:
      pipeline: the pipeline, of a loss.
      optimizer: the optimizer, of placed trees.
    """

    pipeline: Trains
    optimizer: HostOptimizer

    def init(self, staged: Staged) -> StagedState:
        """The optimizer's state for placed parameters."""
        return self.optimizer.init(staged)

    def __call__(
        self, staged: Staged, state: StagedState, *inputs: Any
    ) -> tuple[Staged, StagedState, Any]:
        """Train on one batch. `staged` and `state` are donated: use what comes back instead.

        Only the update donates them, and it starts once all columns have run: an error
        before that leaves them usable.

        Returns:
          (placed parameters, state, value), as `TrainStep` does.
        """
        value, grads = self.pipeline.value_and_grad(staged, *inputs)
        if self.pipeline.loop.has_state:
            value, staged = value
        staged, state = self.optimizer.apply(grads, state, staged)
        return staged, state, value


def host_optimizer(
    placement: HostPlacement,
    trainable: Sequence[bool],
    mesh: Any,
    optimizer: optax.GradientTransformation,
    *,
    shard_over_data: bool = False,
) -> HostOptimizer:
    """An optax optimizer for parameters placed for executor `host`: see `stage_optimizer`."""
    check_optimizer(optimizer, trainable)
    staged = HostOptimizer(placement, tuple(trainable), mesh, optimizer, shard_over_data)
    assert staged.traced.leaves
    return staged
