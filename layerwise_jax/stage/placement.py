"""Where weights live: slots on devices, and the parameters put there and gathered.

All devices run one program, so their weights are held in slots: a slot is one array of shape
(devices, *weight shape), sharded over the devices of a replica, whose d-th row is a weight of
device d in its own shape. Weights that stand at the same place of the common body share a slot;
other weights share a slot where shape and dtype agree; a device that has nothing to put into a slot
leaves zeros there, and that padding is counted.
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

from layerwise_jax._jax import Tracer, is_key, wrap_key
from layerwise_jax.mesh import STAGE
from layerwise_jax.trace.layers import Signature
from layerwise_jax.trace.program import Weight, nbytes

UNSHARDED = PartitionSpec()
Staged = dict[str, Any]


@dataclass(frozen=True)
class Slot:
    """One array over all devices of a replica.

    Attributes:
      name: the path of its weights in the parameter tree: see `slot_names`.
      aval: shape and dtype of one device's row.
      weights: the weight in every device's row, or None where the row is padding.
    """

    name: str
    aval: Any
    weights: tuple[Weight | None, ...]

    @property
    def padding_bytes(self) -> int:
        return nbytes(self.aval) * self.weights.count(None)


@dataclass(frozen=True, eq=False)
class Placement:
    """Every weight's slot and device.

    Attributes:
      slots: all slots.
      num_devices: rows of every slot.
      signature: trees and types of the parameters.
    """

    slots: tuple[Slot, ...]
    num_devices: int
    signature: Signature

    def copies(self) -> dict[Weight, list[tuple[int, int]]]:
        """The (slot, row) places of every weight; a tied weight has several."""
        places: dict[Weight, list[tuple[int, int]]] = {}
        for j, slot in enumerate(self.slots):
            for row, weight in enumerate(slot.weights):
                if weight is not None:
                    places.setdefault(weight, []).append((j, row))
        return places

    @property
    def padding_bytes(self) -> int:
        """Bytes that all devices of a replica together hold in vain."""
        return sum(slot.padding_bytes for slot in self.slots)

    def slot_of(self, stage: int) -> dict[Weight, int]:
        """A slot of every weight on the device of a stage."""
        rows = ((j, slot.weights[stage % self.num_devices]) for j, slot in enumerate(self.slots))
        return {weight: j for j, weight in rows if weight is not None}

    def place(self, params: Any, mesh: Mesh) -> Staged:
        """The parameters as slots, each row on its own device only (one in each replica).

        Args:
          params: the tree that was traced: JAX or numpy arrays, or `jax.ShapeDtypeStruct` for an
            abstract result.
          mesh: the mesh, with an axis `stage`.

        Raises:
          ValueError: the tree, or a leaf's shape or dtype, is not the traced one.
        """
        leaves = self.check(params)
        return {slot.name: self.fill(slot, leaves, mesh) for slot in self.slots}

    def gather(self, staged: Staged) -> Any:
        """The exact inverse of `place`: the user's tree, from the first copy of every weight.

        Gradients are gathered as well, `float0` for those of integers.
        """
        self.check_staged(staged, jax.dtypes.float0)
        parts: dict[int, list[tuple[int, Any]]] = {}
        for weight, ((j, device), *_) in self.copies().items():
            row = _row(staged[self.slots[j].name], device)
            parts.setdefault(weight.leaf, []).append((weight.start or 0, row))
        leaves = [_together(rows) for _, rows in sorted(parts.items())]
        return jax.tree.unflatten(self.signature.params_tree, leaves)

    def check(self, params: Any) -> list[Any]:
        """The leaves of `params`, if tree, shapes and dtypes are those that were traced."""
        leaves, tree = jax.tree.flatten(params)
        if tree != self.signature.params_tree:
            raise ValueError(
                f"The parameters have another tree than the traced ones.\n  came:   {tree}\n"
                f"  wanted: {self.signature.params_tree}\nTrace the model again, or pass the tree "
                "it was traced with."
            )
        avals = list(zip(leaves, self.signature.params_avals, strict=True))
        for name, (leaf, aval) in zip(self.signature.params_names, avals, strict=True):
            # JAX takes arrays of numpy's for what they are to it: float64 for float32, unless that
            # was asked for.
            came = (
                jax.typeof(leaf)
                if isinstance(leaf, np.ndarray) or not hasattr(leaf, "dtype")
                else leaf
            )
            if tuple(came.shape) != aval.shape or came.dtype != aval.dtype:
                raise ValueError(
                    f"Parameter {name} came as {came.dtype}{list(came.shape)}, but was traced as "
                    f"{aval.dtype}"
                    f"{list(aval.shape)}. Convert it, or trace the model with these parameters."
                )
        return [
            leaf if getattr(leaf, "dtype", None) == aval.dtype else jnp.asarray(leaf)
            for leaf, aval in avals
        ]

    def check_staged(self, staged: Any, *dtypes: Any) -> None:
        """Refuse what `place` has not made; slots may have one of `dtypes` instead of their own."""
        names = {slot.name for slot in self.slots}
        if not isinstance(staged, dict) or set(staged) != names:
            came = sorted(staged) if isinstance(staged, dict) else type(staged).__name__
            raise ValueError(
                f"These are not this pipeline's placed parameters: came {came}, wanted the slots "
                f"{sorted(names)}. "
                "Call pipeline.place(params) first."
            )
        for slot in self.slots:
            came, wanted = staged[slot.name], (self.num_devices, *slot.aval.shape)
            if tuple(came.shape) != wanted or came.dtype not in (slot.aval.dtype, *dtypes):
                raise ValueError(
                    f"Slot {slot.name} came as {came.dtype}{list(came.shape)}, wanted "
                    f"{slot.aval.dtype}{list(wanted)}. "
                    "Call pipeline.place(params) of this pipeline."
                )

    def fill(
        self,
        slot: Slot,
        leaves: Sequence[Any] | Mapping[int, Any],
        mesh: Mesh,
        spec: PartitionSpec = UNSHARDED,
    ) -> Any:
        """One slot, given all leaves of the parameters: see `fill_rows`."""
        held = [None if weight is None else leaves[weight.leaf] for weight in slot.weights]
        if not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in held):
            held = [
                leaf if weight is None else weight.of(leaf)
                for weight, leaf in zip(slot.weights, held, strict=True)
            ]
        return self.fill_rows(slot, held, mesh, spec)

    def fill_rows(
        self, slot: Slot, rows: Sequence[Any], mesh: Mesh, spec: PartitionSpec = UNSHARDED
    ) -> Any:
        """One slot, given its rows, None where it holds nothing; abstract if any of them is.

        `spec` is how a row is sharded over other axes of the mesh than `stage`; the slot's type is
        that of a shard.
        """
        sharding = NamedSharding(mesh, PartitionSpec(STAGE, *spec))
        shape = (self.num_devices, *whole_shape(slot.aval.shape, spec, mesh))
        if any(isinstance(row, jax.ShapeDtypeStruct) for row in rows):
            return jax.ShapeDtypeStruct(shape, slot.aval.dtype, sharding=sharding)
        empty = np.zeros(shape[1:], slot.aval.dtype) if spec else _zeros(slot.aval)
        rows = [empty if row is None else row for row in rows]
        if any(isinstance(row, Tracer) for row in rows):
            return jax.lax.with_sharding_constraint(jnp.stack(rows), sharding)
        shards = [
            jax.device_put(_part(rows[index[0].start or 0], index[1:])[None], device)
            for device, index in sharding.addressable_devices_indices_map(shape).items()
            if index is not None
        ]
        return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def whole_shape(shape: Sequence[int], spec: PartitionSpec, mesh: Mesh) -> tuple[int, ...]:
    """The shape of an array, given that of its shards."""
    ways = [math.prod(mesh.shape[name] for name in _names(entry)) for entry in spec]
    return tuple(
        size * way
        for size, way in zip(shape, [*ways, *[1] * (len(shape) - len(ways))], strict=True)
    )


def _names(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _part(array: Any, index: Sequence[slice]) -> Any:
    """A shard of an array; the array itself where that is all of it."""
    return array if all(i == slice(None) for i in index) else array[tuple(index)]


def _together(parts: Sequence[tuple[int, Any]]) -> Any:
    """A leaf from its (first row, rows), or from itself alone."""
    (_, first), *others = sorted(parts, key=lambda part: part[0])
    if not others:
        return first
    # JAX does not concatenate float0, which numpy holds.
    concatenate = np.concatenate if first.dtype == jax.dtypes.float0 else jnp.concatenate
    return concatenate([first, *(rows for _, rows in others)])


def _zeros(aval: Any) -> Any:
    if is_key(aval):
        data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(aval.shape, aval.dtype))
        return wrap_key(np.zeros(data.shape, data.dtype), aval)
    return np.zeros(aval.shape, aval.dtype)


def _row(array: Any, device: int) -> Any:
    """One device's row, read where it lives if the array is concrete."""
    if isinstance(array, Tracer) or not getattr(array, "is_fully_addressable", False):
        return array[device]
    if is_key(array):
        data = _row(jax.random.key_data(array), device)
        return wrap_key(data, array)
    for shard in array.addressable_shards:
        rows = range(*shard.index[0].indices(array.shape[0]))
        if device in rows:
            return jnp.asarray(np.asarray(shard.data)[device - rows.start])
    raise AssertionError("a fully addressable array lacks a row")
