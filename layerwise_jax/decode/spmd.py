"""SPMD program of the ring: its loop under `shard_map`, jitted, with the state donated."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from layerwise_jax.decode.loop import RingLoop
from layerwise_jax.decode.values import Prompts, RingState
from layerwise_jax.mesh import STAGE
from layerwise_jax.stage.placement import Staged


def weights_of(ring: RingLoop, staged: Staged) -> list[Any]:
    """Placed parameters in the order of the program's arguments: by slot, without the cache's.

    Raises:
      ValueError: another ring placed them.
    """
    slots, state = ring.loop.placement.slots, ring.loop.state_slots
    names = [slot.name for j, slot in enumerate(slots) if j not in state]
    if not isinstance(staged, dict) or set(staged) != set(names):
        given = sorted(staged)[:5] if isinstance(staged, dict) else type(staged).__name__
        raise ValueError(
            "staged must be parameters that this ring placed, a dict of "
            f"{len(names)} slots, got {given}. Call ring.place(params) first."
        )
    return [staged[name] for name in names]


def ring_program(ring: RingLoop, mesh: Mesh, prompts: Prompts | None = None) -> Any:
    """The jitted program (weights, places, forced, prompts, operand) -> (places, tokens by
    arrival). Places are donated; the operand is the transport channel's.

    Args:
      ring: the loop.
      mesh: the mesh, with an axis `stage`.
      prompts: for a prefill program, an example of its prompts; None for a program of steps.
    """
    # Every array of the state is [stages, ...].
    by_stage = PartitionSpec(STAGE)
    specs = [slot.placed_spec for slot in ring.loop.placement.slots]
    state = set(ring.loop.state_slots)
    rows: list[Any] = [by_stage] * ring.length
    places = RingState([{j: specs[j] for j in state}] * ring.length, rows, rows, rows, rows)
    mapped = jax.shard_map(
        partial(_on_device, ring),
        mesh=mesh,
        in_specs=(
            [spec for j, spec in enumerate(specs) if j not in state],
            places,
            PartitionSpec(),
            jax.tree.map(lambda _: by_stage, prompts),
            ring.transport.operand_spec(mesh),
        ),
        out_specs=(places, by_stage),
        check_vma=False,
    )
    return jax.jit(mapped, donate_argnums=1)


def _on_device(
    ring: RingLoop,
    weights: list[Any],
    places: RingState,
    forced: Any,
    prompts: Prompts | None,
    operand: Any,
) -> tuple[RingState, Any]:
    # Every array is [1, ...] here, this stage's shard: the loop takes it without that axis.
    shards = iter(weights)
    state = set(ring.loop.state_slots)
    slots = [
        None if j in state else lax.squeeze(next(shards), (0,))
        for j in range(len(ring.loop.placement.slots))
    ]
    local, read = jax.tree.map(lambda x: lax.squeeze(x, (0,)), (places, prompts))
    after, tokens = ring.run(slots, local, forced, read, operand)
    return jax.tree.map(lambda x: lax.expand_dims(x, (0,)), after), tokens[None]
