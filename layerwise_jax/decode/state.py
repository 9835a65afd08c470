"""The groups of a ring as its devices hold them: rotated, so that all devices use the same place in
a tick.

Place j of stage s holds group (j - s) mod R. Every array has a row a stage, sharded over the
stages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from layerwise_jax import processes
from layerwise_jax.decode.loop import RingLoop
from layerwise_jax.decode.values import RingState
from layerwise_jax.mesh import STAGE


def group_of(ring: RingLoop, place: int, stage: int) -> int | None:
    """The group at a place of a stage; None if there is none."""
    group = (place - stage) % ring.length
    return group if group < ring.num_groups else None


def rotated(ring: RingLoop, mesh: Mesh, values: np.ndarray) -> list[jax.Array]:
    """For every place, an array of a row a stage, from values[group]; zeros where there is no
    group.
    """
    sharding = NamedSharding(mesh, PartitionSpec(STAGE))
    result = []
    for j in range(ring.length):
        groups = [group_of(ring, j, s) for s in range(ring.loop.num_stages)]
        rows = [np.zeros_like(values[0]) if g is None else values[g] for g in groups]
        result.append(jax.device_put(np.stack(rows), sharding))
    return result


def start_places(
    ring: RingLoop,
    mesh: Mesh,
    tokens: np.ndarray,
    positions: np.ndarray,
    keys: np.ndarray,
    caches: Sequence[Any],
) -> RingState:
    """All groups before their first step.

    Args:
      ring: the ring.
      mesh: its mesh.
      tokens: int32[groups, sequences], what goes in first.
      positions: int32[groups, sequences], where those tokens stand.
      keys: key data of shape (groups, sequences, ...).
      caches: the leaves of every group's cache, counted as those of the parameters and the cache
        together: by leaf.
    """
    return RingState(
        caches=[place_caches(ring, mesh, j, caches) for j in range(ring.length)],
        tokens=rotated(ring, mesh, tokens),
        positions=rotated(ring, mesh, positions),
        keys=rotated(ring, mesh, keys),
        done=rotated(ring, mesh, np.zeros(tokens.shape, bool)),
    )


def place_caches(
    ring: RingLoop, mesh: Mesh, place: int, caches: Sequence[Mapping[int, Any]]
) -> dict[int, Any]:
    """The cache slots of a place, each stage's row on that stage's devices.

    Args:
      ring: the ring.
      mesh: its mesh.
      place: the place.
      caches: the leaves of every group's cache, by leaf; types alone stand for zeros.
    """
    return {
        j: _fill(ring, mesh, j, _rows_at(ring, place, j, caches)) for j in ring.loop.state_slots
    }


def _rows_at(ring: RingLoop, place: int, j: int, caches: Sequence[Mapping[int, Any]]) -> list[Any]:
    """What each stage holds of a slot at a place: of the group that is there."""
    held = [
        (weight, group_of(ring, place, s))
        for s, weight in enumerate(ring.loop.placement.slots[j].weights)
    ]
    return [
        None if weight is None or group is None else caches[group][weight.leaf]
        for weight, group in held
    ]


def first_cache(ring: RingLoop, mesh: Mesh, leaves: Mapping[int, Any]) -> dict[int, Any]:
    """The cache slots with every stage's part of one cache, whether or not there is a group on each
    stage.
    """
    slots = ring.loop.placement.slots
    rows = {
        j: [None if w is None else leaves[w.leaf] for w in slots[j].weights]
        for j in ring.loop.state_slots
    }
    return {j: _fill(ring, mesh, j, each) for j, each in rows.items()}


def _fill(ring: RingLoop, mesh: Mesh, j: int, rows: Sequence[Any]) -> jax.Array:
    """One slot, given its rows; zeros where there is nothing, or a type alone."""
    placement = ring.loop.placement
    slot = replace(placement.slots[j], spec=ring.specs.get(j, PartitionSpec()))
    concrete = [None if isinstance(row, jax.ShapeDtypeStruct) else row for row in rows]
    if all(row is None for row in concrete):
        aval = slot.placed_aval(mesh)
        return jax.jit(lambda: jnp.zeros(aval.shape, aval.dtype), out_shardings=aval.sharding)()
    return placement.fill_shards(slot, concrete, mesh)


def gather_cache(ring: RingLoop, places: RingState, group: int) -> dict[int, np.ndarray]:
    """The leaves of one group's cache, by leaf."""
    found = {}
    for j in ring.loop.state_slots:
        for s, weight in enumerate(ring.loop.placement.slots[j].weights):
            if weight is not None:
                cache = places.caches[(group + s) % ring.length][j]  # [stages, *leaf shape]
                found[weight.leaf] = processes.read_shard(cache, s)
    return found


def arrival(ring: RingLoop, group: int, step: int) -> tuple[int, int]:
    """(round, place) at which the token of a group's step arrives at the first stage."""
    return divmod(step * ring.length + group + ring.loop.num_stages, ring.length)


def by_arrival(ring: RingLoop, values: np.ndarray, fill: int) -> np.ndarray:
    """values[step, group] in the order of arrival: (steps + 1, length, ...), `fill` where nothing
    arrives.
    """
    steps, groups = values.shape[:2]
    result = np.full((steps + 1, ring.length, *values.shape[2:]), fill, values.dtype)
    for step in range(steps):
        for group in range(groups):
            result[arrival(ring, group, step)] = values[step, group]
    return result


def from_arrival(ring: RingLoop, values: np.ndarray) -> np.ndarray:
    """The inverse: values[step, group] of what arrived."""
    steps = values.shape[0] - 1
    return np.stack(
        [
            np.stack([values[arrival(ring, g, step)] for g in range(ring.num_groups)])
            for step in range(steps)
        ]
    )


def restarted(
    initial: Callable[[int], Any], mask: Sequence[Any], places: RingState, fresh: RingState
) -> RingState:
    """The places with masked sequences as they are in `fresh`, their cache as it was at first.

    Args:
      initial: the first value of a cache slot, a row a stage.
      mask: for every place, bool[stages, sequences].
      places: the places.
      fresh: tokens, positions and keys of the new sequences, its caches not read.
    """

    def chosen(j: int, new: Any, old: Any) -> Any:
        if old.shape[1:2] == mask[j].shape[1:]:
            return jnp.where(mask[j].reshape(*mask[j].shape, *[1] * (old.ndim - 2)), new, old)
        whole = mask[j].all(axis=1)
        return jnp.where(whole.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    return RingState(
        caches=[
            {slot: chosen(j, initial(slot), old) for slot, old in caches.items()}
            for j, caches in enumerate(places.caches)
        ],
        tokens=[
            chosen(j, new, old)
            for j, (new, old) in enumerate(zip(fresh.tokens, places.tokens, strict=True))
        ],
        positions=[
            chosen(j, new, old)
            for j, (new, old) in enumerate(zip(fresh.positions, places.positions, strict=True))
        ],
        keys=[
            chosen(j, new, old)
            for j, (new, old) in enumerate(zip(fresh.keys, places.keys, strict=True))
        ],
        done=[
            chosen(j, new, old)
            for j, (new, old) in enumerate(zip(fresh.done, places.done, strict=True))
        ],
    )
