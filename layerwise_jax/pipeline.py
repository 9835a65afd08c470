"""The stages as one `shard_map` program: a function that jit, grad and vmap accept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from layerwise_jax.alignment import align_stages
from layerwise_jax.batching import Batching, analyse_batching
from layerwise_jax.inputs import check_inputs, input_axes
from layerwise_jax.layers import LayerSequence
from layerwise_jax.loop import Loop, is_key
from layerwise_jax.placement import STAGE, Placement, Staged, assign_slots
from layerwise_jax.measure import measured_by_shape
from layerwise_jax.plan import Plan, Sizes, make_plan
from layerwise_jax.program import nbytes
from layerwise_jax.refusals import check_mesh, check_stageable, check_state, find_state
from layerwise_jax.stages import cut_stages
from layerwise_jax.wiring import wire

DATA = "data"

Reduce = Literal["mean", "sum"]


@dataclass(frozen=True, eq=False)
class Pipeline:
    """A function run layer-wise: contiguous groups of its layers, each on its own device.

    Calling it takes placed parameters and the full batch of inputs, and returns what the unstaged function returns.
    """

    layers: LayerSequence
    mesh: Mesh
    loop: Loop
    batching: Batching
    plan: Plan
    reduce: Reduce | None

    @property
    def placement(self) -> Placement:
        return self.loop.placement

    @property
    def parts(self) -> int:
        """Parts that the batch is split into: microbatches of all replicas."""
        return self.loop.num_microbatches * self.mesh.shape.get(DATA, 1)

    def place(self, params: Any) -> Staged:
        """Every stage's weights on its own devices: see `Placement.place`."""
        return self.placement.place(params, self.mesh)

    def gather(self, staged: Staged) -> Any:
        """The user's parameter tree again: see `Placement.gather`."""
        return self.placement.gather(staged)

    def __call__(self, staged: Staged, *inputs: Any) -> Any:
        """Run the function on a full batch.

        Args:
          staged: what `place` returned.
          *inputs: the inputs, as the traced function takes them, at the full batch.

        Returns:
          What the function returns. If the pipeline has state: (what the function returns, with None in place of the
          new state; the placed parameters with that state).

        Raises:
          ValueError: inputs or placed parameters are not of the traced types.
        """
        self.placement.check_staged(staged)
        leaves = check_inputs(inputs, self.layers.signature, self.loop.in_axes, self.parts)
        slots = [staged[slot.name] for slot in self.placement.slots]
        results, slots = self._mapped(slots, leaves)
        outputs = [None if p in self.loop.state else x for p, x in enumerate(results)]
        tree = jax.tree.unflatten(self.layers.signature.outputs_tree, outputs)
        if not self.loop.state:
            return tree
        return tree, {slot.name: x for slot, x in zip(self.placement.slots, slots, strict=True)}

    def value_and_grad(self, staged: Staged, *inputs: Any) -> tuple[Any, Staged]:
        """The loss and its gradients, where the function returns a scalar loss, alone or first of a tuple.

        Returns:
          (value, gradients): `value` is what calling the pipeline returns, the gradients are placed as the parameters
          are. A tied weight has the whole gradient in every copy, so that an optimiser which works leaf by leaf keeps
          the copies equal. Integer weights have gradients of dtype `float0`, as with `jax.grad(allow_int=True)`.

        Raises:
          ValueError: the function's first output is not a floating-point scalar.
        """
        self._check_loss()

        def loss(staged: Staged) -> tuple[Any, Any]:
            value = self(staged, *inputs)
            return jax.tree.leaves(value)[0], value

        (_, value), grads = jax.value_and_grad(loss, has_aux=True, allow_int=True)(staged)
        return value, self._sum_copies(grads)

    def _check_loss(self) -> None:
        aval = self.layers.signature.outputs_avals[0]
        if aval.shape or not jnp.issubdtype(aval.dtype, jnp.floating):
            raise ValueError(
                f"value_and_grad needs a function whose first output is a floating-point scalar loss; this one's is "
                f"{aval.dtype}{list(aval.shape)}. Stage a loss function, with reduce='mean' or reduce='sum'."
            )

    @cached_property
    def _mapped(self) -> Callable[[Sequence[Any], Sequence[Any]], tuple[list, list]]:
        """The program over the mesh: (slots, input leaves) to (output leaves, slots)."""
        over_batch = PartitionSpec(DATA) if DATA in self.mesh.axis_names else PartitionSpec()
        inputs = [PartitionSpec() if axis is None else over_batch for axis in self.loop.in_axes]
        slots = [PartitionSpec(STAGE)] * len(self.placement.slots)
        outputs = [self._output_spec(position) for position in range(len(self.batching.outputs))]
        return jax.shard_map(
            self._on_device, mesh=self.mesh, in_specs=(slots, inputs), out_specs=(outputs, slots), check_vma=False
        )

    def _on_device(self, slots: Sequence[Any], inputs: Sequence[Any]) -> tuple[list, list]:
        weights = [lax.squeeze(slot, (0,)) for slot in slots]
        replica = lax.axis_index(DATA) if DATA in self.mesh.axis_names else jnp.int32(0)
        split = [self._microbatches(x, axis) for x, axis in zip(inputs, self.loop.in_axes, strict=True)]
        outputs, weights = self.loop.run(weights, split, replica)
        results = [self._finish(position, rows) for position, rows in enumerate(outputs)]
        return results, [lax.expand_dims(weight, (0,)) for weight in weights]

    def _microbatches(self, x: Any, axis: int | None) -> Any:
        count = self.loop.num_microbatches
        return x if axis is None else x.reshape(count, x.shape[0] // count, *x.shape[1:])

    def _finish(self, position: int, rows: Any) -> Any:
        """An output of all microbatches, from its rows on the stage that made it (zeros elsewhere)."""
        role, aval = self.batching.outputs[position].kind, self.layers.signature.outputs_avals[position]
        if role == "rows":
            rows = rows.reshape(-1, *rows.shape[2:])
            result = self._spread(rows) if self._is_spread(rows.shape[0]) else self._everywhere(rows)
        elif role == "reduced":
            result = self._reduce(rows, aval)
        else:
            result = self._everywhere(rows[0])
        return jax.random.wrap_key_data(result, impl=jax.random.key_impl(aval)) if is_key(aval) else result

    def _reduce(self, rows: Any, aval: Any) -> Any:
        over = (STAGE, DATA) if DATA in self.mesh.axis_names else STAGE
        total = lax.psum(jnp.sum(rows, axis=0, dtype=jnp.promote_types(rows.dtype, jnp.float32)), over)
        return (total / self.parts if self.reduce == "mean" else total).astype(aval.dtype)

    def _is_spread(self, num_rows: int) -> bool:
        return num_rows % self.loop.num_stages == 0

    def _spread(self, rows: Any) -> Any:
        """A share of the rows on every stage: nothing is gathered that no one asked for."""
        summed = lax.psum_scatter(_addable(rows), STAGE, scatter_dimension=0, tiled=True)
        return summed.astype(rows.dtype)

    def _everywhere(self, rows: Any) -> Any:
        return lax.psum(_addable(rows), STAGE).astype(rows.dtype)

    def _output_spec(self, position: int) -> PartitionSpec:
        if self.batching.outputs[position].kind != "rows":
            return PartitionSpec()
        rows = self.layers.signature.outputs_avals[position].shape[0] * self.loop.num_microbatches
        axes = [DATA] if DATA in self.mesh.axis_names else []
        axes += [STAGE] if self._is_spread(rows) else []
        return PartitionSpec(tuple(axes)) if axes else PartitionSpec()

    def _sum_copies(self, grads: Staged) -> Staged:
        """Give every copy of a tied weight the sum of all copies' gradients."""
        names = [slot.name for slot in self.placement.slots]
        tied = [places for places in self.placement.copies().values() if len(places) > 1]
        touched = sorted({j for places in tied for j, _ in places if grads[names[j]].dtype != jax.dtypes.float0})
        if not touched:
            return grads

        def on_device(rows: list[Any]) -> list[Any]:
            local, stage = dict(zip(touched, rows, strict=True)), lax.axis_index(STAGE)
            summed = dict(local)
            for places in tied:
                if places[0][0] in local:
                    mine = sum(jnp.where(stage == s, local[j], 0) for j, s in places)
                    total = lax.psum(mine, STAGE)
                    for j, s in places:
                        summed[j] = jnp.where(stage == s, total, summed[j])
            return [summed[j] for j in touched]

        spec = [PartitionSpec(STAGE)] * len(touched)
        mapped = jax.shard_map(on_device, mesh=self.mesh, in_specs=(spec,), out_specs=spec, check_vma=False)
        return {**grads, **dict(zip((names[j] for j in touched), mapped([grads[names[j]] for j in touched]), strict=True))}


def _addable(x: Any) -> Any:
    return x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x


def build_pipeline(
    layers: LayerSequence,
    partition: Any,
    mesh: Mesh,
    num_microbatches: int,
    *,
    in_axes: Any = 0,
    reduce: Reduce | None = None,
    state: Callable[[Any], Any] | None = None,
    batch_statistics: Literal["per_microbatch"] | None = None,
    sizes: Sizes | None = None,
    bubble_fill: float = 0.0,
) -> Pipeline:
    """Build the pipeline of traced layers.

    Args:
      layers: the layers of one microbatch.
      partition: a `Partition`, or its boundaries (0, ..., number of layers).
      mesh: a mesh with an axis `stage` of as many devices as there are stages, and possibly an axis `data` of
        replicas that split the batch.
      num_microbatches: microbatches that each replica runs.
      in_axes: as in `jax.vmap`, over the inputs: 0 for what microbatches split, None for what each gets whole. Random
        keys and scalars are never split.
      reduce: how outputs without a batch axis combine over microbatches.
      state: picks from the function's outputs a part of its parameters with new values (running averages): a tree with
        the same paths as the parameters have. Microbatches update it in their order.
      batch_statistics: "per_microbatch" accepts operations that mix the examples of a batch, each microbatch then
        being a batch of its own; None refuses them.
      sizes: what was measured of the layers, for the plan; None for weights and outputs by shape alone.
      bubble_fill: what idle stages compute on; NaN shows that nothing of it leaks.

    Raises:
      ValueError: the mesh does not fit the partition; see `CutError`, `BatchError` for what cannot be staged.
    """
    boundaries = tuple(getattr(partition, "boundaries", partition))
    replicas = check_mesh(mesh, len(boundaries) - 1)
    check_stageable(layers.program)
    signature = layers.signature
    axes = input_axes(jax.tree.unflatten(signature.inputs_tree, list(signature.inputs_avals)), in_axes)
    new_state = find_state(layers, state, replicas)
    batching = analyse_batching(
        layers, axes, num_microbatches * replicas, reduce=reduce, statistics=batch_statistics, state=tuple(new_state)
    )
    layers = layers.with_program(batching.program)
    stages = cut_stages(layers, boundaries)
    check_state(new_state, stages)
    alignment = align_stages(layers, boundaries, stages, with_body=not new_state)
    placement = assign_slots(layers.program, stages, alignment, layers.signature)
    wiring = wire(layers.program, stages, alignment)
    loop = Loop(
        layers.program, stages, alignment, wiring, placement, num_microbatches, axes, new_state, bubble_fill
    )
    plan = _plan(partition, loop, sizes or measured_by_shape(layers))
    return Pipeline(layers, mesh, loop, batching, plan, reduce)


def _plan(partition: Any, loop: Loop, sizes: Sizes) -> Plan:
    sends = [sum(nbytes(loop.program.avals[x]) for x in stage.sends) for stage in loop.stages]
    return make_plan(
        partition,
        sizes,
        send_bytes=sends,
        num_microbatches=loop.num_microbatches,
        num_ticks=loop.num_ticks,
        padding_bytes=loop.placement.padding_bytes,
        common_layers=loop.alignment.num_layers,
        has_branch=loop.wiring.needs_branch,
    )
