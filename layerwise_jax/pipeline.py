"""`Pipeline`: a staged function as users hold it, which jit, grad and vmap accept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from layerwise_jax.batch.analysis import BatchAnalysis
from layerwise_jax.batch.outputs import Reduction
from layerwise_jax.mesh import DATA, STAGE
from layerwise_jax.options import PipelineOptions
from layerwise_jax.plan import Plan
from layerwise_jax.run.forward import run_forward
from layerwise_jax.run.interleaved import run_forward_in_rounds
from layerwise_jax.run.outputs import Outputs
from layerwise_jax.run.ticks import TrainingLoop
from layerwise_jax.run.tied import tie_copies
from layerwise_jax.schedule.arrays import lower_schedule
from layerwise_jax.schedule.table import Schedule
from layerwise_jax.stage.inputs import check_inputs
from layerwise_jax.stage.placement import Placement, Staged
from layerwise_jax.stage.staged_program import StagedProgram
from layerwise_jax.trace.layers import LayerSequence
from layerwise_jax.train.optimizer import StagedOptimizer, stage_optimizer
from layerwise_jax.train.step import TrainStep, train_step
from layerwise_jax.xla.option_trials import CompiledPipeline, compile_pipeline


@dataclass(frozen=True, eq=False)
class Pipeline:
    """A function run layer-wise: contiguous groups of its layers, each on its own device.

    Calling it takes placed parameters and the full batch of inputs, and returns what the unstaged
    function returns.

    Attributes:
      layers: the traced function of one microbatch.
      mesh: the mesh, with an axis `stage` and possibly `data`.
      loop: the staged program.
      batching: how the outputs of microbatches combine.
      plan: stages, sizes and bounds, as a table.
      schedule: order of forwards and backwards in training.
      options: the options that the pipeline was built with, defaults filled in.
    """

    layers: LayerSequence
    mesh: Mesh
    loop: StagedProgram
    batching: BatchAnalysis
    plan: Plan
    schedule: Schedule
    options: PipelineOptions

    @property
    def placement(self) -> Placement:
        return self.loop.placement

    @property
    def trainable(self) -> tuple[bool, ...]:
        """For every leaf of the parameters, whether it is trained. Integers, state and frozen
        leaves are not.
        """
        held_back = {weight.leaf for weight in (*self.loop.frozen, *self.loop.state.values())}
        avals = self.layers.signature.params_avals
        return tuple(
            i not in held_back and jnp.issubdtype(a.dtype, jnp.inexact) for i, a in enumerate(avals)
        )

    @property
    def parts(self) -> int:
        """Number of parts that the batch is split into: microbatches of all replicas."""
        return self._outputs.parts

    @cached_property
    def _outputs(self) -> Outputs:
        roles: tuple[Reduction, ...] = tuple(role.kind for role in self.batching.outputs)
        return Outputs(
            self.loop,
            roles,
            tuple(self.layers.signature.outputs_avals),
            self.mesh,
            self.options.reduce,
        )

    def place(self, params: Any) -> Staged:
        """Put every stage's weights on its own devices: see `Placement.place`."""
        return self.placement.place(params, self.mesh)

    def gather(self, staged: Staged) -> Any:
        """Return the user's parameter tree, the inverse of `place`: see `Placement.gather`."""
        return self.placement.gather(staged)

    def __call__(self, staged: Staged, *inputs: Any) -> Any:
        """Run the function on a full batch.

        Derivatives of a call are the function's: after `gather`, `jax.grad`, `jax.vjp` and
        `jax.jacrev` are those of the parameters. Every copy of a tied weight has the whole
        gradient. `jax.jvp` takes tangents from `place`; `jax.jacfwd` has a tied weight's derivative
        in its first copy, which `gather` returns, and zeros in the others.

        Args:
          staged: placed parameters, from `place`.
          *inputs: the function's inputs at the full batch.

        Returns:
          The function's value. With state: (the function's value, with None in place of the new
          state; the placed parameters with the new state).

        Raises:
          ValueError: inputs or placed parameters have other types than were traced.
        """
        self.placement.check_staged(staged)
        leaves = check_inputs(inputs, self.layers.signature, self.loop.in_axes, self.parts)
        slots = [staged[slot.name] for slot in self.placement.slots]
        results, slots = self._mapped(slots, leaves)
        return self._value(results, slots)

    def _value(self, results: Sequence[Any], slots: Sequence[Any]) -> Any:
        """The value of a call: the function's outputs, and the placed parameters if they have new
        state.
        """
        outputs = [None if p in self.loop.state else x for p, x in enumerate(results)]
        tree = jax.tree.unflatten(self.layers.signature.outputs_tree, outputs)
        if not self.loop.state:
            return tree
        return tree, {slot.name: x for slot, x in zip(self.placement.slots, slots, strict=True)}

    def value_and_grad(self, staged: Staged, *inputs: Any) -> tuple[Any, Staged]:
        """The loss and its gradients; the loss is the function's output, or the first of a tuple.

        Forward and backward run in the order of the pipeline's schedule; memory is bounded by the
        schedule's stash.

        Args:
          staged: placed parameters, from `place`.
          *inputs: the function's inputs at the full batch.

        Returns:
          (value, gradients): the value of calling the pipeline, and gradients placed as the
          parameters are. Every copy of a tied weight has the whole gradient, so that an optimizer
          that works leaf by leaf keeps the copies equal. Integers and frozen weights have gradients
          of dtype `float0`, as with `jax.grad(allow_int=True)`. State has zeros, and so has a
          frozen weight that shares a slot with trained ones.

        Raises:
          ValueError: the function's first output is not a floating-point scalar.
        """
        self._check_loss()
        self.placement.check_staged(staged)
        leaves = check_inputs(inputs, self.layers.signature, self.loop.in_axes, self.parts)
        slots = [staged[slot.name] for slot in self.placement.slots]
        results, grads, slots = self._mapped_training(slots, leaves)
        moving = iter(grads)
        placed = {
            slot.name: next(moving) if self.loop.has_gradient(j) else self._no_gradient(j, slots[j])
            for j, slot in enumerate(self.placement.slots)
        }
        return self._value(results, slots), placed

    def _no_gradient(self, slot: int, held: Any) -> Any:
        if slot in self.loop.state_slots and jnp.issubdtype(held.dtype, jnp.inexact):
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
        # Cotangent of one microbatch's loss: 1 for a sum, its share of the batch for a mean and for
        # a loss that all microbatches have in common.
        adds = self.options.reduce == "sum" and self.batching.outputs[0].kind == "reduced"
        seed = 1.0 if adds else 1.0 / self.parts
        training = TrainingLoop(
            self.loop,
            lower_schedule(self.schedule),
            self._outputs.roles,
            seed,
            recomputes=self.options.remat == "stage",
            skips_bubbles=bool(self.options.skip_bubbles),
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
        return (
            self._outputs.of_batch(outputs),
            placed,
            [lax.expand_dims(weight, (0,)) for weight in weights_after],
        )

    def optimizer(self, optimizer: Any, *, shard_over_data: bool = False) -> StagedOptimizer:
        """An optax optimizer for placed parameters, equal to optax on the user's tree: see
        `stage_optimizer`.
        """
        return stage_optimizer(
            self.placement, self.trainable, self.mesh, optimizer, shard_over_data=shard_over_data
        )

    def train_step(self, optimizer: Any, *, shard_over_data: bool = False) -> TrainStep:
        """A jitted training step with an optax optimizer: see `TrainStep`."""
        return train_step(self, optimizer, shard_over_data=shard_over_data)

    def compile(
        self,
        staged: Any,
        *inputs: Any,
        options: Literal["auto"] | Mapping[str, Any] | None = "auto",
    ) -> CompiledPipeline:
        """Compile the pipeline with chosen XLA options: see `compile_pipeline`."""
        return compile_pipeline(self, self.mesh, staged, inputs, options)

    def _check_loss(self) -> None:
        aval = self.layers.signature.outputs_avals[0]
        if aval.shape or not jnp.issubdtype(aval.dtype, jnp.floating):
            raise ValueError(
                "The first output of the function must be a floating-point scalar (the loss), got "
                f"{aval.dtype}{list(aval.shape)}. Stage a loss function, with reduce='mean' or "
                "reduce='sum'."
            )

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
        return inputs, slots, self._outputs.specs()

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
                self.loop, self._outputs.roles, weights, split, replica
            )
            return self._outputs.of_batch(outputs), [
                lax.expand_dims(weight, (0,)) for weight in weights
            ]
        outputs, weights = run_forward(self.loop, weights, split, replica)
        return self._outputs.of_rows(outputs), [lax.expand_dims(weight, (0,)) for weight in weights]

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
