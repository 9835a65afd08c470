"""The ring's loop as a program over the mesh."""

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
    """Placed parameters in the order in which a program takes them: by slot, those of the cache
    left out.

    Raises:
      ValueError: they were not placed by this ring.
    """
    slots, state = ring.loop.placement.slots, ring.loop.state_slots
    names = [slot.name for j, slot in enumerate(slots) if j not in state]
    if not isinstance(staged, dict) or set(staged) != set(names):
        raise ValueError(
            "These are not this ring's placed parameters. Call ring.place(params) first."
        )
    return [staged[name] for name in names]


def ring_program(ring: RingLoop, mesh: Mesh, prompts: Prompts | None = None) -> Any:
    """(weights, places, forced, prompts, operand) to (places, tokens by arrival), jitted; the
    places are donated. The operand is that of the transport's channel.

    Args:
      ring: the loop.
      mesh: the mesh, with an axis `stage`.
      prompts: for a program that reads prompts, some of those; else it takes None in their place.
    """
    by_stage = PartitionSpec(STAGE)
    specs = [
        PartitionSpec(STAGE, *ring.specs.get(j, ())) for j in range(len(ring.loop.placement.slots))
    ]
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
    rows, state = iter(weights), set(ring.loop.state_slots)
    slots = [
        None if j in state else lax.squeeze(next(rows), (0,))
        for j in range(len(ring.loop.placement.slots))
    ]
    local, read = jax.tree.map(lambda x: lax.squeeze(x, (0,)), (places, prompts))
    after, tokens = ring.run(slots, local, forced, read, operand)
    return jax.tree.map(lambda x: lax.expand_dims(x, (0,)), after), tokens[None]
