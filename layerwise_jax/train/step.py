"""Training step: the pipeline's gradients and an optax update in one compiled function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import jax
import optax
from jax.sharding import Mesh

from layerwise_jax._jax import no_context_mesh
from layerwise_jax.mesh import in_context, moved_to
from layerwise_jax.stage.placement import Placement, Staged
from layerwise_jax.train.optimizer import StagedOptimizer, StagedState, stage_optimizer


class Trains(Protocol):
    """Interface of a pipeline that a training step uses."""

    @property
    def mesh(self) -> Mesh: ...

    @property
    def placement(self) -> Placement: ...

    @property
    def trainable(self) -> tuple[bool, ...]: ...

    @property
    def loop(self) -> Any: ...

    def value_and_grad(self, staged: Staged, *inputs: Any, **named: Any) -> tuple[Any, Staged]: ...


@dataclass(frozen=True, eq=False)
class TrainStep:
    """Training step: call it with placed parameters, optimizer state and a batch.

    Attributes:
      pipeline: pipeline of a loss function.
      optimizer: optimizer of placed trees.
    """

    pipeline: Trains
    optimizer: StagedOptimizer

    def init(self, staged: Staged) -> StagedState:
        """Initial optimizer state for placed parameters."""
        return self.optimizer.init(staged)

    def __call__(
        self, staged: Staged, state: StagedState, *inputs: Any, **named: Any
    ) -> tuple[Staged, StagedState, Any]:
        """Train on one batch. `staged` and `state` are donated: use the returned ones.

        Returns:
          (placed parameters, optimizer state, value). New model state, such as batch statistics,
          is among the parameters. The value is what the loss function returns, with None in place
          of new model state.
        """
        mesh = self.pipeline.mesh
        with no_context_mesh():
            inputs, named = moved_to(mesh, (inputs, named))
            staged, state, value = self._jitted(staged, state, *inputs, **named)
        return staged, state, in_context(mesh, value)

    @cached_property
    def _jitted(self) -> Callable[..., tuple[Staged, StagedState, Any]]:
        return jax.jit(self._step, donate_argnums=(0, 1))

    def _step(
        self, staged: Staged, state: StagedState, *inputs: Any, **named: Any
    ) -> tuple[Staged, StagedState, Any]:
        value, grads = self.pipeline.value_and_grad(staged, *inputs, **named)
        updates, state = self.optimizer.update(grads, state, staged)
        if self.pipeline.loop.has_state:
            value, staged = value
        trained = self.optimizer.trained_slots
        moved = {name: optax.apply_updates(staged[name], updates[name]) for name in trained}
        return {**staged, **moved}, state, value


def train_step(
    pipeline: Trains, optimizer: optax.GradientTransformation, *, shard_over_data: bool = False
) -> TrainStep:
    """Compiled training step.

    Args:
      pipeline: pipeline of a function whose first output is the loss.
      optimizer: optax optimizer of the user's own tree.
      shard_over_data: shard the optimizer's state over the replicas of the mesh axis `data`.

    Raises:
      ValueError: nothing is trained, or the optimizer combines large values of several parameters.
    """
    staged = stage_optimizer(
        pipeline.placement,
        pipeline.trainable,
        pipeline.mesh,
        optimizer,
        shard_over_data=shard_over_data,
    )
    return TrainStep(pipeline, staged)
