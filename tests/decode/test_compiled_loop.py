"""The compiled loop of a ring moves no cache, has one message a tick, and no branch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from layerwise_jax.cost.devices import H100
from layerwise_jax.decode.build import decode_ring
from layerwise_jax.decode.ring import DecodeRing
from layerwise_jax.decode.values import RingState
from layerwise_jax.xla.aot import absent_mesh, can_compile_for_absent_gpus
from tests.models.ring import WIDTH, Step, gpt, gpt_cache, gpt_step, scanned_gpt_step, stacked
from tests.support.hlo_text import loop_bodies, read_module


def places_of(ring: DecodeRing, mesh: Mesh) -> RingState:
    """The types of what `start` returns."""
    sharding, stages, length = (
        NamedSharding(mesh, PartitionSpec("stage")),
        mesh.shape["stage"],
        ring.ring.length,
    )

    def typed(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((stages, *shape), dtype, sharding=sharding)

    slots = ring.ring.loop.placement.slots
    caches = {
        j: typed(*slots[j].aval.shape, dtype=slots[j].aval.dtype)
        for j in ring.ring.loop.state_slots
    }
    rows: list[Any] = [typed(ring.group_size)] * length
    keys: list[Any] = [typed(ring.group_size, 2, dtype=jnp.uint32)] * length
    return RingState(
        [caches] * length, rows, rows, keys, [typed(ring.group_size, dtype=jnp.bool_)] * length
    )


def steady_round(mesh: Mesh, step: Step = gpt_step, **options: Any) -> Any:
    """(the instructions of a steady round, the compiled program, bytes of all caches)."""
    types, cache = jax.eval_shape(lambda: (gpt(4), gpt_cache(4, 3)))
    if step is scanned_gpt_step:
        types, cache = jax.eval_shape(
            lambda: ({**gpt(4), "blocks": stacked(gpt(4)["blocks"])}, stacked(gpt_cache(4, 3)))
        )
    ring = decode_ring(step, types, cache, group_size=3, mesh=mesh, **options)
    places = places_of(ring, mesh)
    compiled = ring.compiled(ring.place(types), places, 9)
    bodies = loop_bodies(read_module(compiled.as_text()))
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(places.caches)) // mesh.size
    return max(bodies, key=len), compiled, held


MESHES = [
    "cpu",
    pytest.param(
        "h100",
        marks=pytest.mark.skipif(
            not can_compile_for_absent_gpus(), reason="no compiler for absent GPUs"
        ),
    ),
]


@pytest.mark.parametrize("step", [gpt_step, scanned_gpt_step])
@pytest.mark.parametrize("target", MESHES)
def test_a_round_moves_no_cache_and_has_one_message_a_tick(
    target: str, step: Step, stage_mesh: Callable[..., Mesh]
) -> None:
    mesh = stage_mesh(2) if target == "cpu" else absent_mesh(H100, {"stage": 2})
    body, compiled, cache_bytes = steady_round(mesh, step)
    opcodes = [instruction.opcode.removesuffix("-start") for instruction in body]
    assert opcodes.count("collective-permute") == 2  # a round of two stages has two ticks
    assert "conditional" not in opcodes
    assert "while" not in opcodes
    moves = ("copy", "copy-start", "dynamic-slice", "slice")
    sizes = [instruction.num_elements or 0 for instruction in body if instruction.opcode in moves]
    assert max(sizes, default=0) < WIDTH * WIDTH  # the least of a weight and of a cache
    stats = compiled.memory_analysis()
    assert stats.alias_size_in_bytes >= cache_bytes


def test_a_branch_is_seen_where_there_is_one(stage_mesh: Callable[..., Mesh]) -> None:
    """The control of the test above: embedding and head under conditions."""
    body, _, _ = steady_round(stage_mesh(2), selects=False)
    assert any(instruction.opcode == "while" for instruction in body)
