"""The peer-store transport in a ring: compiled for absent GPUs, run with another kernel."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from layerwise_jax.cost.devices import H100
from layerwise_jax.decode.transport.mailbox import Mailboxes, TransportError
from layerwise_jax.decode.transport.peer_store import PeerChannel, PeerStore
from layerwise_jax.mesh import STAGE
from layerwise_jax.xla.aot import absent_mesh, can_compile_for_absent_gpus
from layerwise_jax.xla.cuda_driver import CudaDriver
from tests.decode.test_compiled_loop import steady_round
from tests.models.ring import assert_same_tokens, gpt, make_ring, prompts_for, unstaged
from tests.support.fake_cuda import FakeCuda
from tests.support.hlo_text import read_module

needs_plugin = pytest.mark.skipif(
    not can_compile_for_absent_gpus(), reason="no compiler for absent GPUs"
)


@dataclass(frozen=True)
class PermutedWords(PeerStore):
    """Peer stores whose kernel is a permute of the same words, over mailboxes in host memory."""

    def move(self, sent: Any, layout: Any, table: Any, after: Any) -> list[Any]:
        stages = lax.axis_size(STAGE)
        assert table.shape == (10,)
        assert sum(x.size * x.dtype.itemsize for x in sent) == 16 * sum(layout.pieces)
        ring = [(s, (s + 1) % stages) for s in range(stages)]
        # The table's first word goes into nothing, so that it is an operand of the program.
        mark = (table[0] & 0).astype(jnp.uint8)
        return [lax.ppermute(x + mark.astype(x.dtype), STAGE, ring) for x in sent]

    def open(self, mesh: Any, avals: Any) -> PeerChannel:
        channel = super().open(mesh, avals)
        driver = CudaDriver(FakeCuda())
        channel.make_mailboxes = lambda _, layout: Mailboxes(
            driver, np.arange(mesh.shape[STAGE])[:, None], layout
        )
        return channel


@pytest.mark.parametrize(
    ("model", "layers", "stages", "group"),
    [
        ("recurrent", 3, 3, 1),
        pytest.param("gpt", 5, 3, 2, marks=pytest.mark.slow),
        pytest.param("counting", 5, 5, 1, marks=pytest.mark.slow),
    ],
)
def test_the_messages_words_carry_the_unstaged_loops_tokens(model, layers, stages, group):
    ring = make_ring(model, layers, stages, group, transport=PermutedWords())
    assert ring.ring.message.carrier is None  # tokens have an array of their own
    prompts = prompts_for(ring, more=1, same_length=model == "counting")
    generation = ring.generate(ring.place(gpt(layers)), prompts, 6)
    assert_same_tokens(generation.tokens, unstaged(model, layers, prompts))


def test_a_failed_run_raises_and_the_next_is_right():
    ring = make_ring("gpt", 2, 2, 1, transport=PermutedWords(wait_seconds=3))
    staged, prompts = ring.place(gpt(2)), prompts_for(ring)
    ring.generate(staged, prompts, 2)
    boxes = ring._channel.mailboxes
    check = boxes.check

    def failing(wait_seconds: float) -> None:
        boxes._reports[0] = 5
        boxes.check = check
        boxes.check(wait_seconds)

    boxes.check = failing
    with pytest.raises(TransportError, match="Stage 0 got no message from stage 1 within 3 s"):
        ring.generate(staged, prompts, 6)
    generation = ring.generate(staged, prompts, 6)
    assert_same_tokens(generation.tokens, unstaged("gpt", 2, prompts))


def test_a_table_lies_as_the_mesh_does(stage_mesh):
    mesh = stage_mesh(2, tensor=3)
    swapped = jax.sharding.Mesh(mesh.devices.T, ("tensor", "stage"))
    for each in (mesh, swapped):
        avals = [jax.ShapeDtypeStruct((4,), jnp.int32)]
        channel = PeerStore().open(each, avals)
        ordinals = np.arange(6).reshape(2, 3)
        driver = CudaDriver(FakeCuda())
        channel.make_mailboxes = lambda _, layout, driver=driver, ordinals=ordinals: Mailboxes(
            driver, ordinals, layout
        )
        table = channel._table
        assert table.sharding.spec == PartitionSpec(*each.axis_names)
        assert channel.operand_type.shape == table.shape == (*each.devices.shape, 10)
        moved = np.moveaxis(np.asarray(table), each.axis_names.index("stage"), 0)
        np.testing.assert_array_equal(moved, channel.mailboxes.table())


@needs_plugin
@pytest.mark.parametrize("stages", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))])
def test_the_compiled_loop_has_a_kernel_a_tick_and_no_collective(stages):
    mesh = absent_mesh(H100, {"stage": stages})
    body, compiled, _ = steady_round(mesh, transport="peer_store")
    calls = [x for x in body if x.opcode == "custom-call"]
    assert len(calls) == stages
    opcodes = {
        x.opcode for computation in read_module(compiled.as_text()).values() for x in computation
    }
    collectives = ("collective-permute", "all-reduce", "all-gather", "all-to-all")
    assert not [x for x in opcodes if x.startswith(collectives)]
    if stages != 3:  # four layers are not equal stages then, and caches are copied in any ring
        assert max([x.num_elements or 0 for x in body if x.opcode == "copy"], default=0) <= 1


def test_devices_are_known_by_their_cuda_ordinals():
    seen = []
    devices = np.array([SimpleNamespace(local_hardware_id=i, id=i) for i in (5, 3)])
    mesh: Any = SimpleNamespace(devices=devices, axis_names=("stage",), shape={"stage": 2})
    channel = PeerStore().open(mesh, [jax.ShapeDtypeStruct((4,), jnp.int32)])
    channel.make_mailboxes = lambda ordinals, layout: seen.append((ordinals.tolist(), layout))
    assert channel.mailboxes is None
    assert seen == [([[5], [3]], channel.layout)]
