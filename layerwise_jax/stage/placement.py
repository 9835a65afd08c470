"""Placement of weights: slots sharded over the devices of a replica, filled and gathered.

All devices run one program, so weights are held in slots. A slot is one array of shape
[devices, *weight shape], sharded over the devices of a replica; shard d is a weight of device d in
its own shape. Weights at the same place of the common body share a slot; other weights share one
where shape and dtype agree. A device without a weight for a slot holds zeros: padding bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from layerwise_jax import processes
from layerwise_jax._jax import Tracer, is_key, wrap_key
from layerwise_jax.mesh import STAGE
from layerwise_jax.schedule.table import round_robin_device
from layerwise_jax.stage.inputs import tree_difference
from layerwise_jax.trace.layers import Signature
from layerwise_jax.trace.program import Weight, nbytes

UNSHARDED = PartitionSpec()

# Placed parameters: one array [devices, *weight shape] per slot, by the slot's name.
Staged = dict[str, Any]


@dataclass(frozen=True)
class Slot:
    """One array over all devices of a replica.

    Attributes:
      name: the paths of its weights in the parameter tree: see `slot_names`.
      aval: shape and dtype of one device's shard.
      weights: the weight in every device's shard, or None where the shard is padding.
      spec: sharding of a weight over mesh axes other than `stage`; `aval` is the type of a shard.
    """

    name: str
    aval: Any
    weights: tuple[Weight | None, ...]
    spec: PartitionSpec = UNSHARDED

    @property
    def padding_bytes(self) -> int:
        return nbytes(self.aval) * self.weights.count(None)

    @property
    def placed_spec(self) -> PartitionSpec:
        """Sharding of the whole slot, the axis of devices first."""
        return PartitionSpec(STAGE, *self.spec)

    def placed_aval(self, mesh: Mesh) -> jax.ShapeDtypeStruct:
        """Type of the whole slot: [devices, *weight shape], with its sharding on `mesh`."""
        shape = (len(self.weights), *unsharded_shape(self.aval.shape, self.spec, mesh))
        sharding = NamedSharding(mesh, self.placed_spec)
        return jax.ShapeDtypeStruct(shape, self.aval.dtype, sharding=sharding)


@dataclass(frozen=True, eq=False)
class Placement:
    """The slot and the devices of every weight.

    Attributes:
      slots: all slots.
      num_devices: devices of a replica, and shards of every slot.
      signature: trees and types of the parameters.
      body_slots: for every chunk (see `StagedProgram.num_chunks`), the slots of the common body's
        weights, in the order in which the body takes them.
    """

    slots: tuple[Slot, ...]
    num_devices: int
    signature: Signature
    body_slots: tuple[tuple[int, ...], ...] = ()

    def copies(self) -> dict[Weight, list[tuple[int, int]]]:
        """The (slot, device) places of every parameter's weight; a tied weight has several."""
        places: dict[Weight, list[tuple[int, int]]] = {}
        for j, slot in enumerate(self.slots):
            for device, weight in enumerate(slot.weights):
                if weight is not None and not weight.is_captured:
                    places.setdefault(weight, []).append((j, device))
        return places

    @property
    def padding_bytes(self) -> int:
        """Padding bytes of all devices of a replica together."""
        return sum(slot.padding_bytes for slot in self.slots)

    def device_of(self, stage: int) -> int:
        """The device of a stage: stages are assigned round-robin."""
        return round_robin_device(stage, self.num_devices)

    def slot_of(self, stage: int) -> dict[Weight, int]:
        """A slot of every weight on the device of a stage."""
        device = self.device_of(stage)
        held = ((j, slot.weights[device]) for j, slot in enumerate(self.slots))
        return {weight: j for j, weight in held if weight is not None}

    def specs(self) -> dict[str, PartitionSpec]:
        """The sharding of every slot, by name: a tree of specs for `Staged`."""
        return {slot.name: slot.placed_spec for slot in self.slots}

    def in_order(self, staged: Staged) -> list[Any]:
        """The arrays of placed parameters, in the order of the slots."""
        return [staged[slot.name] for slot in self.slots]

    def named(self, arrays: Sequence[Any]) -> Staged:
        """The inverse of `in_order`."""
        return {slot.name: x for slot, x in zip(self.slots, arrays, strict=True)}

    def place(self, params: Any, mesh: Mesh) -> Staged:
        """Put every weight on its own devices only, once in each replica.

        Args:
          params: the traced tree: JAX or numpy arrays, or `jax.ShapeDtypeStruct` for an abstract
            result.
          mesh: the mesh, with an axis `stage`.

        Raises:
          ValueError: the tree, or a leaf's shape or dtype, is not the traced one.
        """
        leaves = self.check(params)
        # one slot at a time otherwise: no second copy of all parameters
        if processes.is_partial(leaves):
            return self._place_global(leaves, mesh)
        return {slot.name: self.fill(slot, leaves, mesh) for slot in self.slots}

    def _place_global(self, leaves: Sequence[Any], mesh: Mesh) -> Staged:
        """`place` for arrays of which this process holds only a part: one program over all."""
        avals = {slot.name: slot.placed_aval(mesh) for slot in self.slots}

        def stacked(*leaves: Any) -> Staged:
            return {slot.name: jnp.stack(self._weights(slot, leaves)) for slot in self.slots}

        shardings = {name: aval.sharding for name, aval in avals.items()}
        return processes.compute(stacked, mesh, *leaves, shardings=shardings)

    def _weights(self, slot: Slot, leaves: Sequence[Any]) -> list[Any]:
        """The weight of every device, zeros where a slot has none."""
        # a slot holds one weight at least, whose type is that of all its shards
        some = next(weight.of(leaves[weight.leaf]) for weight in slot.weights if weight is not None)
        padding = jnp.zeros_like(some)
        return [padding if w is None else w.of(leaves[w.leaf]) for w in slot.weights]

    def gather(self, staged: Staged, out_shardings: Any = None) -> Any:
        """The exact inverse of `place`: the user's tree, from the first copy of every weight.

        Gradients can be gathered too, `float0` for those of integers.

        Args:
          staged: placed parameters, or gradients of them.
          out_shardings: shardings of the leaves, a tree or a prefix of it. None: of one process,
            arrays on the default device; of several, each leaf is spread over all devices, so that
            none holds the whole model. `NamedSharding(mesh, PartitionSpec())` asks for all of it
            everywhere.
        """
        self.check_staged(staged, jax.dtypes.float0)
        if not processes.is_partial(staged):
            tree = self._tree(self._leaves(staged))
            return tree if out_shardings is None else jax.device_put(tree, out_shardings)
        # float0, which numpy holds, enters no program.
        arrays = {name: x for name, x in staged.items() if isinstance(x, jax.Array)}
        rest = {name: x for name, x in staged.items() if name not in arrays}
        mesh = processes.mesh_of(next(iter(arrays.values())))
        shardings = None
        if out_shardings is not None:
            leaves = jax.tree.leaves(
                jax.tree.broadcast(
                    out_shardings, self._tree(range(len(self.signature.params_avals)))
                )
            )
            shardings = {leaf: leaves[leaf] for leaf in jax.eval_shape(self._leaves, arrays)}
        leaves = processes.compute(self._leaves, mesh, arrays, shardings=shardings)
        return self._tree({**leaves, **self._leaves(rest)})

    def _leaves(self, staged: Staged) -> dict[int, Any]:
        """Leaves of the parameters, by number, of which the slots are in `staged`."""
        parts: dict[int, list[tuple[int, Any]]] = {}  # leaf -> (first index, slice of the leaf)
        # Copies of a tied weight are equal: the first is taken.
        for weight, ((j, device), *_) in self.copies().items():
            if self.slots[j].name in staged:
                shard = read_shard(staged[self.slots[j].name], device)
                parts.setdefault(weight.leaf, []).append((weight.start or 0, shard))
        return {leaf: _together(slices) for leaf, slices in parts.items()}

    def _tree(self, leaves: Any) -> Any:
        count = len(self.signature.params_avals)
        return jax.tree.unflatten(self.signature.params_tree, [leaves[i] for i in range(count)])

    def check(self, params: Any) -> list[Any]:
        """Check tree, shapes and dtypes of `params` against the traced ones; return the leaves.

        Raises:
          ValueError: they differ; the message names the parameter.
        """
        leaves, tree = jax.tree.flatten(params)
        if tree != self.signature.params_tree:
            raise ValueError(
                f"params must have the traced tree, got another"
                f"{tree_difference(self.signature.params_tree, tree)}. Trace the model again, or "
                "pass the tree that it was traced with."
            )
        avals = list(zip(leaves, self.signature.params_avals, strict=True))
        for name, (leaf, aval) in zip(self.signature.params_names, avals, strict=True):
            # numpy arrays count as what JAX makes of them: float64 as float32 without enable_x64
            is_converted = isinstance(leaf, np.ndarray) or not hasattr(leaf, "dtype")
            given = jax.typeof(leaf) if is_converted else leaf
            if tuple(given.shape) != aval.shape or given.dtype != aval.dtype:
                raise ValueError(
                    f"parameter {name} must be {aval.dtype}{list(aval.shape)} as traced, got "
                    f"{given.dtype}{list(given.shape)}. Convert it, or trace the model with these "
                    "parameters."
                )
        return [
            leaf if getattr(leaf, "dtype", None) == aval.dtype else jnp.asarray(leaf)
            for leaf, aval in avals
        ]

    def check_staged(self, staged: Any, *dtypes: Any) -> None:
        """Refuse a tree that `place` of this placement did not make.

        Args:
          staged: the tree.
          *dtypes: dtypes that a slot may have instead of its own.

        Raises:
          ValueError: other slots, or another shape or dtype of a slot.
        """
        names = {slot.name for slot in self.slots}
        if not isinstance(staged, dict) or set(staged) != names:
            given = sorted(staged) if isinstance(staged, dict) else type(staged).__name__
            raise ValueError(
                "staged must be this pipeline's placed parameters, with the slots "
                f"{sorted(names)}, got {given}. Call pipeline.place(params) first."
            )
        for slot in self.slots:
            # whole slots: [devices, *weight shape]
            given, shape = staged[slot.name], (self.num_devices, *slot.aval.shape)
            if tuple(given.shape) != shape or given.dtype not in (slot.aval.dtype, *dtypes):
                raise ValueError(
                    f"slot {slot.name} must be {slot.aval.dtype}{list(shape)}, got {given.dtype}"
                    f"{list(given.shape)}. Call pipeline.place(params) of this pipeline."
                )

    def fill(self, slot: Slot, leaves: Sequence[Any] | Mapping[int, Any], mesh: Mesh) -> Any:
        """One slot, given all leaves of the parameters: see `fill_shards`."""
        captured = self.signature.captured
        held = [
            None if w is None else captured[w.leaf] if w.is_captured else leaves[w.leaf]
            for w in slot.weights
        ]
        weights = [
            leaf if weight is None or _is_abstract(leaf) else weight.of(leaf)  # a slice, if stacked
            for weight, leaf in zip(slot.weights, held, strict=True)
        ]
        return self.fill_shards(slot, weights, mesh)

    def fill_shards(self, slot: Slot, weights: Sequence[Any], mesh: Mesh) -> Any:
        """One slot, given the weight of every device, whole, or None for padding.

        The slot is abstract if any weight is a `jax.ShapeDtypeStruct`.
        """
        aval = slot.placed_aval(mesh)
        local = processes.local_shards(aval.sharding, aval.shape)
        # A process may leave abstract what only devices of other processes hold.
        held = [weights[index[0].start or 0] for _, index in local]
        if any(map(_is_abstract, held if processes.is_distributed() else weights)):
            return aval
        padding = np.zeros(aval.shape[1:], aval.dtype) if slot.spec else _zeros(slot.aval)
        weights = [padding if weight is None else weight for weight in weights]
        # Under jit there are no shards to make: stack and let XLA place them.
        if any(isinstance(weight, Tracer) for weight in weights):
            return jax.lax.with_sharding_constraint(jnp.stack(weights), aval.sharding)
        shards = [  # [1, *shard shape] for every device that this process has
            jax.device_put(_part(weights[index[0].start or 0], index[1:])[None], device)
            for device, index in local
        ]
        return jax.make_array_from_single_device_arrays(
            aval.shape, aval.sharding, shards, dtype=slot.aval.dtype
        )


def read_shard(array: Any, device: int) -> Any:
    """The weight of one device from a slot [devices, *weight shape].

    Args:
      array: the slot, as an array or traced.
      device: the device's index along the first axis.

    Returns:
      [*weight shape], copied from the shard that holds it if the array is concrete and the shard
      holds all of the weight; else indexed by JAX, which gathers what other devices hold.
    """
    if isinstance(array, Tracer) or not isinstance(array, jax.Array):
        return array[device]
    return jnp.asarray(processes.read_shard(array, device))


def unsharded_shape(shape: Sequence[int], spec: PartitionSpec, mesh: Mesh) -> tuple[int, ...]:
    """The shape of an array, given the shape of its shards by `spec` on `mesh`."""
    ways = [math.prod(mesh.shape[name] for name in _names(entry)) for entry in spec]
    ways += [1] * (len(shape) - len(ways))
    return tuple(size * way for size, way in zip(shape, ways, strict=True))


def _names(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a spec."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _is_abstract(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def _part(array: Any, index: Sequence[slice]) -> Any:
    """A shard of an array; the array itself, uncopied, where that is all of it."""
    return array if all(i == slice(None) for i in index) else array[tuple(index)]


def _together(parts: Sequence[tuple[int, Any]]) -> Any:
    """A leaf from its (first index, slice) parts, which may be one."""
    (_, first), *others = sorted(parts, key=lambda part: part[0])
    if not others:
        return first
    # JAX does not concatenate float0, which numpy holds.
    concatenate = np.concatenate if first.dtype == jax.dtypes.float0 else jnp.concatenate
    return concatenate([first, *(part for _, part in others)])


def _zeros(aval: Any) -> Any:
    """Padding of a type; random keys of zeros as key data."""
    if is_key(aval):
        data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(aval.shape, aval.dtype))
        return wrap_key(np.zeros(data.shape, data.dtype), aval)
    return np.zeros(aval.shape, aval.dtype)
