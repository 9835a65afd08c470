"""Placement of executor `host`: every weight in its own shape on the devices of its column, without
padding.

A slot is one weight on one column: an array [1, *shape] sharded over the column's sub-mesh, exactly
a shard of the
loop's slot. A weight that several columns read has a slot on each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from layerwise_jax import processes
from layerwise_jax._jax import Tracer
from layerwise_jax.mesh import STAGE
from layerwise_jax.stage.cut import Stage
from layerwise_jax.stage.placement import Placement, Slot
from layerwise_jax.stage.slot_names import slot_names
from layerwise_jax.trace.layers import Signature
from layerwise_jax.trace.program import Program, Weight, nbytes


@jax.tree_util.register_pytree_with_keys_class
class HostStaged(dict[str, Any]):
    """Parameters placed for executor `host`: slot name to array. Its type tells which executor
    runs.
    """

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
        names = tuple(sorted(self))
        return [(jax.tree_util.DictKey(name), self[name]) for name in names], names

    def tree_flatten(self) -> tuple[list[Any], tuple[str, ...]]:
        names = tuple(sorted(self))
        return [self[name] for name in names], names

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], arrays: Sequence[Any]) -> HostStaged:
        return cls(zip(names, arrays, strict=True))


@dataclass(frozen=True, eq=False)
class HostPlacement(Placement):
    """Every weight's slot and column; `num_devices`, the rows of a slot, is 1.

    Attributes:
      column_of: the column of every slot.
      meshes: the sub-mesh of every column.
    """

    column_of: tuple[int, ...] = ()
    meshes: tuple[Mesh, ...] = ()

    def place(self, params: Any, mesh: Mesh | None = None) -> HostStaged:
        """The parameters as slots, each on its column's devices: see `Placement.place`. `mesh` is
        not used.
        """
        del mesh
        leaves = self.check(params)
        slots = zip(self.slots, self.column_of, strict=True)
        return HostStaged(
            {slot.name: self.fill(slot, leaves, self.meshes[column]) for slot, column in slots}
        )

    @cached_property
    def of_column(self) -> tuple[Placement, ...]:
        """For every column, a placement of its slots only."""
        return tuple(
            Placement(tuple(self.slots[j] for j in self._slots_on(column)), 1, self.signature)
            for column in range(len(self.meshes))
        )

    @cached_property
    def slots_of(self) -> tuple[dict[Weight, Slot], ...]:
        """For every column, the slot of every weight."""
        return tuple(
            {weight: slot for slot in own.slots for weight in slot.weights if weight is not None}
            for own in self.of_column
        )

    def _slots_on(self, column: int) -> list[int]:
        return [j for j, on in enumerate(self.column_of) if on == column]


def check_one_process(mesh: Mesh) -> None:
    """Refuse a mesh over several processes: a thread reaches only the devices of its process.

    Raises:
      ValueError: the mesh has devices of several processes.
    """
    if processes.are_of_several(list(mesh.devices.flat)):
        raise ValueError(
            "executor must be 'loop' on a mesh over several processes, got 'host'. Leave "
            "executor='auto'."
        )


def column_meshes(mesh: Mesh) -> tuple[Mesh, ...]:
    """The sub-mesh of every column: the devices of one index on the axis `stage`, which is kept
    with size 1.
    """
    axis = mesh.axis_names.index(STAGE)
    types = (AxisType.Auto,) * len(mesh.axis_names)
    columns = np.split(mesh.devices, mesh.devices.shape[axis], axis=axis)
    return tuple(Mesh(devices, mesh.axis_names, axis_types=types) for devices in columns)


def place_columns(
    program: Program,
    stages: Sequence[Stage],
    devices: Mapping[int, int],
    signature: Signature,
    mesh: Mesh,
    state: Mapping[int, Weight],
) -> HostPlacement:
    """Give every weight a slot on each column that reads or renews it, an unused one on the
    lightest column.

    Args:
      program: the program.
      stages: its stages.
      devices: the column of every stage.
      signature: trees and types of the parameters.
      mesh: the mesh; its axis `stage` has as many devices as there are columns.
      state: for outputs that are new values of weights, which weight.
    """
    check_one_process(mesh)
    meshes = column_meshes(mesh)
    avals = {weight: program.avals[x] for x, weight in program.weights.items()}
    # Dicts as ordered sets: slots are in the order of first use.
    held: list[dict[Weight, None]] = [{} for _ in meshes]
    for s, stage in enumerate(stages):
        # A weight that the stage only writes needs a slot here too.
        renewed = [state[p] for p in stage.outputs if p in state]
        held[devices[s]].update(dict.fromkeys([*stage.weights.values(), *renewed]))
    used = {weight for column in held for weight in column}
    for weight in (weight for weight in avals if weight not in used):
        lightest = min(range(len(held)), key=lambda c: sum(nbytes(avals[w]) for w in held[c]))
        held[lightest][weight] = None
    rows = [(column, weight) for column, weights in enumerate(held) for weight in weights]
    # A row per column, so that names say where a weight is: `block_0/kernel @0`.
    names = slot_names(
        [
            [weight if column == c else None for c in range(len(held))] + [None]
            for column, weight in rows
        ],
        signature.path,
    )
    slots = tuple(
        Slot(name, avals[weight], (weight,)) for name, (_, weight) in zip(names, rows, strict=True)
    )
    columns = tuple(column for column, _ in rows)
    return HostPlacement(slots, 1, signature, column_of=columns, meshes=meshes)


def check_not_traced(staged: HostStaged, inputs: Sequence[Any]) -> None:
    """Refuse a call under `jit`, `grad` or `vmap`: programs on other devices cannot be part of one.

    Raises:
      ValueError: a leaf is a tracer.
    """
    if any(isinstance(x, Tracer) for x in (*staged.values(), *inputs)):
        raise ValueError(
            "Placed parameters of executor 'host' must not be traced, got a call under jax.jit, "
            "jax.grad or jax.vmap. Call the pipeline and its value_and_grad directly, or place "
            "parameters with executor='loop'."
        )
