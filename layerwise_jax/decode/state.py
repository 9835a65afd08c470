"""Ring state on the mesh: groups rotated by stage, so that all devices use one place in a tick.

Place j of stage s holds group (j - s) mod R. Every array is [stages, ...], sharded over `stage`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from layerwise_jax import processes
from layerwise_jax.decode.loop import RingLoop
from layerwise_jax.decode.values import RingState
from layerwise_jax.mesh import STAGE


def group_of(ring: RingLoop, place: int, stage: int) -> int | None:
    """The group at a place of a stage; None where the ring has fewer groups than places."""
    group = (place - stage) % ring.length
    return group if group < ring.num_groups else None


def rotated(ring: RingLoop, mesh: Mesh, values: np.ndarray) -> list[jax.Array]:
    """values[group] as one array [stages, ...] a place; zeros where there is no group."""
    sharding = NamedSharding(mesh, PartitionSpec(STAGE))
    result = []
    for j in range(ring.length):
        # by stage
        groups = [group_of(ring, j, s) for s in range(ring.loop.num_stages)]
        by_stage = [np.zeros_like(values[0]) if g is None else values[g] for g in groups]
        result.append(jax.device_put(np.stack(by_stage), sharding))
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
      tokens: int32[groups, sequences], first inputs.
      positions: int32[groups, sequences], positions of these tokens.
      keys: key data [groups, sequences, ...].
      caches: for every group, the cache's leaves by leaf number. Leaves of the parameters and the
        cache are numbered together.
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
    """The cache slots of a place, each stage's shard on that stage's devices.

    Args:
      ring: the ring.
      mesh: its mesh.
      place: the place.
      caches: for every group, the cache's leaves by leaf number; a type means zeros.
    """
    return {
        j: _fill(ring, mesh, j, _shards_at(ring, place, j, caches)) for j in ring.loop.state_slots
    }


def _shards_at(
    ring: RingLoop, place: int, j: int, caches: Sequence[Mapping[int, Any]]
) -> list[Any]:
    """Every stage's shard of slot j, of the group that the stage has at a place."""
    # by stage
    shards = []
    for s, weight in enumerate(ring.loop.placement.slots[j].weights):
        group = group_of(ring, place, s)
        shards.append(None if weight is None or group is None else caches[group][weight.leaf])
    return shards


def first_cache(ring: RingLoop, mesh: Mesh, leaves: Mapping[int, Any]) -> dict[int, Any]:
    """The cache slots with every stage's shard of one cache, whatever groups there are."""
    found = {}
    for j in ring.loop.state_slots:
        weights = ring.loop.placement.slots[j].weights
        found[j] = _fill(ring, mesh, j, [None if w is None else leaves[w.leaf] for w in weights])
    return found


def _fill(ring: RingLoop, mesh: Mesh, j: int, shards: Sequence[Any]) -> jax.Array:
    """One slot, given its shards; zeros for None and for types."""
    placement = ring.loop.placement
    slot = placement.slots[j]
    arrays = [None if isinstance(x, jax.ShapeDtypeStruct) else x for x in shards]
    if all(x is None for x in arrays):
        return _zeros(slot.placed_aval(mesh))
    return placement.fill_shards(slot, arrays, mesh)


@partial(jax.jit, static_argnums=0)  # one compilation per type for the process
def _zeros(aval: jax.ShapeDtypeStruct) -> jax.Array:
    """Zeros made in their sharding: no device ever holds all of them."""
    return lax.with_sharding_constraint(jnp.zeros(aval.shape, aval.dtype), aval.sharding)


def gather_cache(ring: RingLoop, places: RingState, group: int) -> dict[int, np.ndarray]:
    """One group's cache on the host, by leaf number."""
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
    """values[step, group] in the order of arrival: [steps + 1, length, ...], `fill` where nothing
    arrives.
    """
    steps, groups = values.shape[:2]
    # The ring is full after the first round, so tokens arrive a round late.
    result = np.full((steps + 1, ring.length, *values.shape[2:]), fill, values.dtype)
    for step in range(steps):
        for group in range(groups):
            result[arrival(ring, group, step)] = values[step, group]
    return result


def from_arrival(ring: RingLoop, values: np.ndarray) -> np.ndarray:
    """The inverse of `by_arrival`: [steps, groups, ...] of [steps + 1, length, ...]."""
    steps = values.shape[0] - 1
    groups = range(ring.num_groups)
    return np.stack(
        [np.stack([values[arrival(ring, g, step)] for g in groups]) for step in range(steps)]
    )


def restarted(
    mask: Sequence[Any], places: RingState, fresh: RingState, first: Mapping[int, Any] | None
) -> RingState:
    """The state with masked sequences replaced by new ones, whose caches are the first cache.

    Args:
      mask: for every place, bool[stages, sequences].
      places: the state.
      fresh: tokens, positions and keys of the new sequences; its caches are not read.
      first: the first cache by slot, [stages, ...]; None for zeros.
    """

    def chosen(j: int, new: Any, old: Any) -> Any:
        if old.shape[1:2] == mask[j].shape[1:]:  # [stages, sequences, ...]
            return jnp.where(mask[j].reshape(*mask[j].shape, *[1] * (old.ndim - 2)), new, old)
        # The group shares this leaf, so it starts anew only if all of the group do.
        all_new = mask[j].all(axis=1)
        return jnp.where(all_new.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    def chosen_at_places(new: Sequence[Any], old: Sequence[Any]) -> list[Any]:
        return [chosen(j, *pair) for j, pair in enumerate(zip(new, old, strict=True))]

    caches = [
        {
            slot: chosen(j, jnp.zeros_like(old) if first is None else first[slot], old)
            for slot, old in held.items()
        }
        for j, held in enumerate(places.caches)
    ]
    others = [chosen_at_places(new, old) for new, old in zip(fresh[1:], places[1:], strict=True)]
    return RingState(caches, *others)
