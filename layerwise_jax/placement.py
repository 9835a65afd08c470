"""Which weight lives on which stage, and back.

All devices run one program, so their weights are held in slots: a slot is one array of shape (devices, *weight shape),
sharded over the devices of a replica, whose d-th row is a weight of device d in its own shape. Weights that stand at
the same place of the common body share a slot; other weights share a slot where shape and dtype agree; a device that
has nothing to put into a slot leaves zeros there, and that padding is counted. Stage s lives on device s % devices.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from layerwise_jax._jax import Tracer, is_key, wrap_key
from layerwise_jax.alignment import Alignment
from layerwise_jax.layers import Signature
from layerwise_jax.program import Program, Value, Weight, nbytes
from layerwise_jax.slot_names import slot_names
from layerwise_jax.stages import Stage

STAGE = "stage"
DATA = "data"
UNSHARDED = PartitionSpec()

Staged = dict[str, Any]

# A slot being filled: its type, and the weight in every row.
Row = tuple[Any, list[Weight | None]]


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
          params: the tree that was traced: JAX or numpy arrays, or `jax.ShapeDtypeStruct` for an abstract result.
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
                f"  wanted: {self.signature.params_tree}\nTrace the model again, or pass the tree it was traced with."
            )
        avals = list(zip(leaves, self.signature.params_avals, strict=True))
        for name, (leaf, aval) in zip(self.signature.params_names, avals, strict=True):
            # JAX takes arrays of numpy's for what they are to it: float64 for float32, unless that was asked for.
            came = jax.typeof(leaf) if isinstance(leaf, np.ndarray) or not hasattr(leaf, "dtype") else leaf
            if tuple(came.shape) != aval.shape or came.dtype != aval.dtype:
                raise ValueError(
                    f"Parameter {name} came as {came.dtype}{list(came.shape)}, but was traced as {aval.dtype}"
                    f"{list(aval.shape)}. Convert it, or trace the model with these parameters."
                )
        return [leaf if getattr(leaf, "dtype", None) == aval.dtype else jnp.asarray(leaf) for leaf, aval in avals]

    def check_staged(self, staged: Any, *dtypes: Any) -> None:
        """Refuse what `place` has not made; slots may have one of `dtypes` instead of their own."""
        names = {slot.name for slot in self.slots}
        if not isinstance(staged, dict) or set(staged) != names:
            came = sorted(staged) if isinstance(staged, dict) else type(staged).__name__
            raise ValueError(
                f"These are not this pipeline's placed parameters: came {came}, wanted the slots {sorted(names)}. "
                "Call pipeline.place(params) first."
            )
        for slot in self.slots:
            came, wanted = staged[slot.name], (self.num_devices, *slot.aval.shape)
            if tuple(came.shape) != wanted or came.dtype not in (slot.aval.dtype, *dtypes):
                raise ValueError(
                    f"Slot {slot.name} came as {came.dtype}{list(came.shape)}, wanted {slot.aval.dtype}{list(wanted)}. "
                    "Call pipeline.place(params) of this pipeline."
                )

    def fill(
        self, slot: Slot, leaves: Sequence[Any] | Mapping[int, Any], mesh: Mesh, spec: PartitionSpec = UNSHARDED
    ) -> Any:
        """One slot, given all leaves of the parameters: see `fill_rows`."""
        held = [None if weight is None else leaves[weight.leaf] for weight in slot.weights]
        if not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in held):
            held = [
                leaf if weight is None else weight.of(leaf) for weight, leaf in zip(slot.weights, held, strict=True)
            ]
        return self.fill_rows(slot, held, mesh, spec)

    def fill_rows(self, slot: Slot, rows: Sequence[Any], mesh: Mesh, spec: PartitionSpec = UNSHARDED) -> Any:
        """One slot, given its rows, None where it holds nothing; abstract if any of them is.

        `spec` is how a row is sharded over other axes of the mesh than `stage`; the slot's type is that of a shard.
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
    return tuple(size * way for size, way in zip(shape, [*ways, *[1] * (len(shape) - len(ways))], strict=True))


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


def assign_slots(
    program: Program,
    stages: Sequence[Stage],
    alignment: Alignment,
    signature: Signature,
    num_devices: int,
    *,
    state: Mapping[int, Weight],
    kinds: Mapping[Weight, Hashable] | None = None,
) -> Placement:
    """Give every weight of every stage a slot.

    Outside of the common body, weights share a slot with their own kind only; state, which changes with each
    microbatch, is a kind of its own.

    Args:
      program: the program.
      stages: its stages; stage s lives on device s % num_devices.
      alignment: which weights stand at the same place of the stages' common body.
      signature: trees and types of the parameters.
      num_devices: devices of a replica.
      state: for outputs that are new values of weights, which weight.
      kinds: the kinds of weights; those that are not in it are of one kind.
    """
    kind_of = dict(kinds or {})
    kind_of.update({weight: ("state", kind_of.get(weight)) for weight in state.values()})
    rows = _body_rows(program, alignment, num_devices)
    common = len(rows)
    for (value, weight), users in _odd_weights(program, stages, rows, num_devices, state).items():
        shareable = [j for j in range(common, len(rows)) if _kinds(rows[j][1], kind_of) == {kind_of.get(weight)}]
        slot = _free_slot(rows, shareable, program.avals[value], users, num_devices)
        for device in users:
            rows[slot][1][device] = weight
    names = slot_names([weights for _, weights in rows], signature.params_paths)
    slots = tuple(Slot(name, aval, tuple(weights)) for name, (aval, weights) in zip(names, rows, strict=True))
    return Placement(slots, num_devices, signature)


def _body_rows(program: Program, alignment: Alignment, num_devices: int) -> list[Row]:
    """Slots of the common body, those of the first stage of every device first."""
    weights = [part.shape.weights for part in alignment.parts]
    return [
        (program.avals[values[0]], [program.weights[value] for value in values])
        for first in range(0, len(weights), num_devices)
        for values in zip(*weights[first : first + num_devices], strict=True)
    ]


def _kinds(weights: Sequence[Weight | None], kind_of: Mapping[Weight, Hashable]) -> set[Hashable]:
    return {kind_of.get(weight) for weight in weights if weight is not None}


def _odd_weights(
    program: Program,
    stages: Sequence[Stage],
    rows: Sequence[Row],
    num_devices: int,
    state: Mapping[int, Weight],
) -> dict[tuple[Value, Weight], list[int]]:
    """The devices that use each weight outside the common body; a weight that nothing uses lives on device 0."""
    placed = [{weights[device] for _, weights in rows} for device in range(num_devices)]
    renewed = [{state[p] for p in stage.outputs if p in state} for stage in stages]
    used = {value for stage in stages for value in stage.weights}
    odd: dict[tuple[Value, Weight], list[int]] = {}
    for value, weight in program.weights.items():
        readers = [s for s, stage in enumerate(stages) if value in stage.weights or weight in renewed[s]]
        users = [device for device in sorted({s % num_devices for s in readers}) if weight not in placed[device]]
        if users or value not in used:
            odd[value, weight] = users or [0]
    return dict(sorted(odd.items(), key=lambda item: -len(item[1])))


def _free_slot(rows: list[Row], shareable: Sequence[int], aval: Any, users: Sequence[int], num_devices: int) -> int:
    """The first of the slots that may be shared that has this type and room on these devices, or a new one."""
    for j in shareable:
        other, weights = rows[j]
        if (other.shape, other.dtype) == (aval.shape, aval.dtype) and all(weights[d] is None for d in users):
            return j
    rows.append((aval, [None] * num_devices))
    return len(rows) - 1
