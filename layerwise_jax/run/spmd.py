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

from layerwise_jax.mesh import DATA, STAGE, in_context, on_own_mesh
from layerwise_jax.run.outputs import Outputs
from layerwise_jax.run.tick import Backward
from layerwise_jax.run.ticks import TickLoop
from layerwise_jax.run.tied import tie_copies
from layerwise_jax.run.wire import choose
from layerwise_jax.schedule.arrays import lower_schedule
from layerwise_jax.schedule.table import Schedule
from layerwise_jax.stage.placement import Placement, Staged
from layerwise_jax.stage.staged_program import StagedProgram


@dataclass(frozen=True, eq=False)
class LoopExecutor:
    """A pipeline's stages as one program over the mesh, stepped by ticks.

    Placed parameters are one dict (`Staged`) from `Placement.place` to the devices of the program.

    Attributes:
      loop: the staged program.
      outputs: how the function's outputs combine over microbatches.
      schedule: the order of forwards and backwards.
      backward: options of the backward pass.
    """

    loop: StagedProgram
    outputs: Outputs
    schedule: Schedule
    backward: Backward

    @property
    def placement(self) -> Placement:
        """The slots of weights."""
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
        results, after = self._call(self._forward_program, staged, inputs)
        return in_context(self.mesh, results), after

    def _call(self, program: Callable[..., Any], staged: Staged, inputs: Sequence[Any]) -> Any:
        """A program over the mesh, on arrays moved there if they are elsewhere."""
        specs = self.placement.specs(), self._input_specs()
        return on_own_mesh(self.mesh, program, (dict(staged), list(inputs)), specs)

    def value_and_grad(
        self, staged: Staged, inputs: Sequence[Any]
    ) -> tuple[list[Any], Staged, Staged]:
        """All outputs for the batch, placed gradients, and the placed parameters with new state.

        Args:
          staged: placed parameters.
          inputs: the leaves of the full batch.
        """
        results, gradients, after = self._call(self._training_program, staged, inputs)
        for j, slot in enumerate(self.placement.slots):
            if slot.name not in gradients:  # the program returns gradients of trained slots only
                gradients[slot.name] = self._no_gradient(j, staged[slot.name])
        return in_context(self.mesh, results), gradients, after

    def _no_gradient(self, slot: int, held: Any) -> Any:
        """Zeros for state, float0 for integers and frozen weights."""
        is_state = any(map(self.loop.is_state, self.placement.slots[slot].weights))
        if is_state and jnp.issubdtype(held.dtype, jnp.inexact):
            return jnp.zeros_like(held)
        return np.zeros(held.shape, jax.dtypes.float0)

    @cached_property
    def _forward_program(self) -> Callable[[Staged, Sequence[Any]], tuple[list, Staged]]:
        """The forward program: (weights, inputs) -> (outputs, weights)."""
        ticks = TickLoop.forward(self.loop, self.outputs.roles)
        slots = self.placement.specs()
        program = jax.shard_map(
            partial(self._forward_on_device, ticks),
            mesh=self.mesh,
            in_specs=(slots, self._input_specs()),
            out_specs=(self.outputs.specs(), slots),
            check_vma=False,  # replayed equations do not say what varies over the mesh
        )
        # jit: a call that nothing traces compiles once. inline: under a trace nothing changes.
        return jax.jit(program, inline=True)

    @cached_property
    def _training_program(self) -> Callable[[Staged, Sequence[Any]], tuple[list, Staged, Staged]]:
        """The training program: (weights, inputs) -> (outputs, gradients, weights)."""
        ticks = TickLoop(
            self.loop, lower_schedule(self.schedule), self.outputs.roles, self.backward
        )
        slots = self.placement.specs()
        names = [slot.name for slot in self.placement.slots]
        trained = {name: slots[name] for j, name in enumerate(names) if self.loop.has_gradient(j)}
        program = jax.shard_map(
            partial(self._train_on_device, ticks),
            mesh=self.mesh,
            in_specs=(slots, self._input_specs()),
            out_specs=(self.outputs.specs(), trained, slots),
            check_vma=False,
        )
        return jax.jit(program, inline=True)

    def _forward_on_device(
        self, ticks: TickLoop, staged: Staged, inputs: Sequence[Any]
    ) -> tuple[list, Staged]:
        # The loop is differentiated by jax.grad: a tied weight's copies count as one variable.
        # Captured arrays are constants of the function: their slots have no gradient.
        constant = [any(w and w.is_captured for w in slot.weights) for slot in self.placement.slots]
        shards = [
            lax.stop_gradient(x) if is_constant else x
            for x, is_constant in zip(self._shards(staged), constant, strict=True)
        ]
        weights = tie_copies(shards, self.placement.copies())
        outputs, _, weights = ticks.run(weights, self._split(inputs), self._replica())
        results = self.outputs.combine(outputs)
        return results, self._slots(weights, results)

    def _train_on_device(
        self, ticks: TickLoop, staged: Staged, inputs: Sequence[Any]
    ) -> tuple[list, Staged, Staged]:
        weights = self._shards(staged)
        outputs, sums, after = ticks.run(weights, self._split(inputs), self._replica())
        # sums: by slot, in the accumulator's dtype, for the microbatches of this replica
        sums = self._without_frozen(self._sum_copies(sums))
        if DATA in self.mesh.axis_names:
            sums = [None if x is None else lax.psum(x, DATA) for x in sums]
        gradients = {
            slot.name: total.astype(weight.dtype)[None]  # [1, *weight shape]
            for slot, total, weight in zip(self.placement.slots, sums, weights, strict=True)
            if total is not None
        }
        results = self.outputs.combine(outputs)
        return results, gradients, self._slots(after, results)

    def _input_specs(self) -> list[PartitionSpec]:
        """The sharding of every input leaf: split over replicas if it has a batch axis."""
        over_batch = PartitionSpec(DATA) if DATA in self.mesh.axis_names else PartitionSpec()
        return [PartitionSpec() if axis is None else over_batch for axis in self.loop.in_axes]

    def _shards(self, staged: Staged) -> list[Any]:
        """On a device: its weight of every slot, in the weight's own shape."""
        return [lax.squeeze(x, (0,)) for x in self.placement.in_order(staged)]

    def _slots(self, weights: Sequence[Any], results: Sequence[Any]) -> Staged:
        """On a device: its shards of the slots after a call, renewed state included.

        Args:
          weights: the weights that the tick loop left; carried state is new in them.
          results: the outputs of the batch. Renewed state is among them, equal on all devices.
        """
        device = lax.axis_index(STAGE)
        renewed = list(weights)
        for position, leaf in self.loop.renewed.items():
            for weight, places in self.placement.copies().items():
                if weight.leaf != leaf:
                    continue
                new = weight.of(results[position])
                for j, d in places:
                    renewed[j] = choose(device == d, new, renewed[j])
        return self.placement.named([lax.expand_dims(weight, (0,)) for weight in renewed])

    def _split(self, inputs: Sequence[Any]) -> list[Any]:
        """On a device: inputs with a batch axis as [microbatches, rows, ...]."""
        count = self.loop.num_microbatches
        return [
            x if axis is None else x.reshape(count, x.shape[0] // count, *x.shape[1:])
            for x, axis in zip(inputs, self.loop.in_axes, strict=True)
        ]

    def _replica(self) -> Any:
        return lax.axis_index(DATA) if DATA in self.mesh.axis_names else jnp.int32(0)

    def _sum_copies(self, gradients: list[Any]) -> list[Any]:
        """On a device: every copy of a tied weight gets the sum of all copies' gradients."""
        device = lax.axis_index(STAGE)
        summed = list(gradients)
        for places in self.placement.copies().values():
            if len(places) > 1 and gradients[places[0][0]] is not None:
                # a device adds the copies it has, in whatever slot; psum adds the devices
                mine = sum(jnp.where(device == d, gradients[j], 0) for j, d in places)
                total = lax.psum(mine, STAGE)
                for j, d in places:
                    summed[j] = jnp.where(device == d, total, summed[j])
        return summed

    def _without_frozen(self, gradients: list[Any]) -> list[Any]:
        """On a device: zeros for frozen weights in slots that hold trained weights too."""
        device = lax.axis_index(STAGE)
        for j, slot in enumerate(self.placement.slots):
            frozen = [weight in self.loop.frozen for weight in slot.weights]  # by device
            if gradients[j] is not None and any(frozen):
                gradients[j] = jnp.where(jnp.asarray(frozen)[device], 0, gradients[j])
        return gradients
