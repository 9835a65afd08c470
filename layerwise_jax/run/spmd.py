"""Executor `loop`: all stages in one `shard_map` program, which jit, grad and vmap accept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from layerwise_jax.mesh import DATA, STAGE
from layerwise_jax.run.forward import run_forward
from layerwise_jax.run.interleaved import run_forward_in_rounds
from layerwise_jax.run.outputs import Outputs
from layerwise_jax.run.ticks import TrainingLoop
from layerwise_jax.run.tied import tie_copies
from layerwise_jax.run.wire import choose
from layerwise_jax.schedule.arrays import lower_schedule
from layerwise_jax.schedule.table import Schedule
from layerwise_jax.stage.placement import Placement, Staged
from layerwise_jax.stage.staged_program import StagedProgram


@dataclass(frozen=True, eq=False)
class LoopExecutor:
    """A pipeline's stages as one program over the mesh, stepped by ticks.

    Attributes:
      loop: the staged program.
      outputs: how the function's outputs combine over microbatches.
      schedule: the order of forwards and backwards.
      seed: the cotangent of the loss of one microbatch.
      recomputes: whether backward runs a stage again from what it received.
      skips_bubbles: whether devices branch around the work while they have no microbatch.
    """

    loop: StagedProgram
    outputs: Outputs
    schedule: Schedule
    seed: float
    recomputes: bool
    skips_bubbles: bool

    @property
    def placement(self) -> Placement:
        """Where weights live."""
        return self.loop.placement

    @property
    def mesh(self) -> Mesh:
        return self.outputs.mesh

    def evaluate(self, staged: Staged, inputs: Sequence[Any]) -> tuple[list[Any], Staged]:
        """All outputs for the batch, and the placed parameters with new state.

        Args:
          staged: placed parameters.
          inputs: the leaves of the full batch.
        """
        results, slots = self._mapped([staged[slot.name] for slot in self.placement.slots], inputs)
        return results, self._named(slots)

    def value_and_grad(
        self, staged: Staged, inputs: Sequence[Any]
    ) -> tuple[list[Any], Staged, Staged]:
        """All outputs for the batch, placed gradients, and the placed parameters with new state."""
        slots = [staged[slot.name] for slot in self.placement.slots]
        results, grads, slots = self._mapped_training(slots, inputs)
        moving = iter(grads)
        placed = {
            slot.name: next(moving) if self.loop.has_gradient(j) else self._no_gradient(j, slots[j])
            for j, slot in enumerate(self.placement.slots)
        }
        return results, placed, self._named(slots)

    def _named(self, slots: Sequence[Any]) -> Staged:
        return {slot.name: x for slot, x in zip(self.placement.slots, slots, strict=True)}

    def _no_gradient(self, slot: int, held: Any) -> Any:
        is_state = any(map(self.loop.is_state, self.placement.slots[slot].weights))
        if is_state and jnp.issubdtype(held.dtype, jnp.inexact):
            return jnp.zeros_like(held)
        return np.zeros(held.shape, jax.dtypes.float0)

    @cached_property
    def _mapped_training(self) -> Callable[[Sequence[Any], Sequence[Any]], tuple[list, list, list]]:
        """The training program over the mesh: (slots, input leaves) to (output leaves, gradients,
        slots).
        """
        inputs, slots, outputs = self._specs()
        grads = [
            PartitionSpec(STAGE)
            for j in range(len(self.placement.slots))
            if self.loop.has_gradient(j)
        ]
        training = TrainingLoop(
            self.loop,
            lower_schedule(self.schedule),
            self.outputs.roles,
            self.seed,
            recomputes=self.recomputes,
            skips_bubbles=self.skips_bubbles,
        )
        return jax.shard_map(
            partial(self._train_on_device, training),
            mesh=self.mesh,
            in_specs=(slots, inputs),
            out_specs=(outputs, grads, slots),
            check_vma=False,
        )

    def _train_on_device(
        self, training: TrainingLoop, slots: Sequence[Any], inputs: Sequence[Any]
    ) -> tuple[list, list, list]:
        weights, split, replica = self._local(slots, inputs)
        outputs, grads, weights_after = training.run(weights, split, replica)
        grads = self._without_frozen(self._sum_copies(grads))
        if DATA in self.mesh.axis_names:
            grads = [None if g is None else lax.psum(g, DATA) for g in grads]
        placed = [
            grad.astype(weight.dtype)[None]
            for grad, weight in zip(grads, weights, strict=True)
            if grad is not None
        ]
        results = self.outputs.of_batch(outputs)
        return results, placed, self._slots(weights_after, results)

    def _slots(self, weights: Sequence[Any], results: Sequence[Any]) -> list[Any]:
        """On a device: its shards of the slots after a call, renewed state included.

        Args:
          weights: the weights that the tick loop left; carried state is new in them.
          results: the outputs of the batch. Renewed state is among them, equal on all devices.
        """
        device, renewed = lax.axis_index(STAGE), list(weights)
        for position, leaf in self.loop.renewed.items():
            for weight, places in self.placement.copies().items():
                if weight.leaf != leaf:
                    continue
                for j, row in places:
                    new = weight.of(results[position])
                    renewed[j] = choose(device == row, new, renewed[j])
        return [lax.expand_dims(weight, (0,)) for weight in renewed]

    @cached_property
    def _mapped(self) -> Callable[[Sequence[Any], Sequence[Any]], tuple[list, list]]:
        """The program over the mesh: (slots, input leaves) to (output leaves, slots)."""
        inputs, slots, outputs = self._specs()
        return jax.shard_map(
            self._on_device,
            mesh=self.mesh,
            in_specs=(slots, inputs),
            out_specs=(outputs, slots),
            check_vma=False,
        )

    def _specs(self) -> tuple[list, list, list]:
        """Partition specs of (inputs, slots, outputs)."""
        over_batch = PartitionSpec(DATA) if DATA in self.mesh.axis_names else PartitionSpec()
        inputs = [PartitionSpec() if axis is None else over_batch for axis in self.loop.in_axes]
        slots = [PartitionSpec(STAGE)] * len(self.placement.slots)
        return inputs, slots, self.outputs.specs()

    def _local(self, slots: Sequence[Any], inputs: Sequence[Any]) -> tuple[list, list, Any]:
        """On a device: (its shard of every slot, inputs split into microbatches, index on the data
        axis).
        """
        weights = [lax.squeeze(slot, (0,)) for slot in slots]
        replica = lax.axis_index(DATA) if DATA in self.mesh.axis_names else jnp.int32(0)
        return (
            weights,
            [
                self._microbatches(x, axis)
                for x, axis in zip(inputs, self.loop.in_axes, strict=True)
            ],
            replica,
        )

    def _on_device(self, slots: Sequence[Any], inputs: Sequence[Any]) -> tuple[list, list]:
        weights, split, replica = self._local(slots, inputs)
        weights = tie_copies(weights, self.placement.copies())
        if self.loop.num_chunks > 1:
            outputs, weights = run_forward_in_rounds(
                self.loop, self.outputs.roles, weights, split, replica
            )
            results = self.outputs.of_batch(outputs)
        else:
            outputs, weights = run_forward(self.loop, weights, split, replica)
            results = self.outputs.of_rows(outputs)
        return results, self._slots(weights, results)

    def _microbatches(self, x: Any, axis: int | None) -> Any:
        count = self.loop.num_microbatches
        return x if axis is None else x.reshape(count, x.shape[0] // count, *x.shape[1:])

    def _sum_copies(self, grads: list[Any]) -> list[Any]:
        """On a device: every copy of a tied weight gets the sum of all copies' gradients."""
        device, summed = lax.axis_index(STAGE), list(grads)
        for places in self.placement.copies().values():
            if len(places) > 1 and grads[places[0][0]] is not None:
                mine = sum(jnp.where(device == row, grads[j], 0) for j, row in places)
                total = lax.psum(mine, STAGE)
                for j, row in places:
                    summed[j] = jnp.where(device == row, total, summed[j])
        return summed

    def _without_frozen(self, grads: list[Any]) -> list[Any]:
        """On a device: zeros for frozen weights in slots that others are trained in."""
        device = lax.axis_index(STAGE)
        for j, slot in enumerate(self.placement.slots):
            frozen = [weight in self.loop.frozen for weight in slot.weights]
            if grads[j] is not None and any(frozen):
                grads[j] = jnp.where(jnp.asarray(frozen)[device], 0, grads[j])
        return grads
