"""Peer store on one GPU, its own peer: stores, turn numbers, waits and times of the kernel.

A ring of one stage needs no message. Here it gets one, so that the kernel, its mailbox, XLA's
recording of the loop and the bound of a wait are tried where there is no second GPU.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments.dense16.cases import toy_model
from experiments.dense16.measure import Session, Settings
from experiments.dense16.message import message_records
from experiments.dense16.transport import LONG_ROUNDS, Trial, models
from layerwise_jax.decode import Mailboxes, PeerStore, Permute, TransportError
from layerwise_jax.xla import CudaDriver

Record = dict[str, Any]

BY_STAGE = PartitionSpec("stage")
TURNS = 5_000
# Bytes that are no multiple of a piece, several types, and more pieces than all threads.
ARRAYS = (((8_193,), jnp.uint16), ((5,), jnp.int32), ((3,), jnp.uint8), ((300_001,), jnp.uint8))
WAIT_SECONDS = 2.0


@dataclass(frozen=True)
class SelfStore(PeerStore):
    """Peer stores that a ring of one stage keeps, where `decode_ring` would permute."""


class Deaf(Mailboxes):
    """Two mailboxes on one device, of which the device fills one and polls the other."""

    def table(self) -> np.ndarray:
        return super().table()[:1]


def measure_self_message(
    settings: Settings, path: Path, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Everything that one GPU shows of the peer store; returns the document."""
    session = Session(settings, path, progress)
    device = session.devices[0]
    acts: dict[str, Callable[[], Iterator[Record]]] = {"tokens": partial(ring_records, settings)}
    if settings.scale == "gpu":
        acts = {
            "turns": partial(turn_records, device),
            "a message that never arrives": partial(wait_records, device),
            **acts,
            "times": partial(message_records, [device]),
        }
    for what, act in acts.items():
        session.progress(what)
        for record in session.guarded("self", what, act):
            session.add(record)
    return session.document


def mesh_of(device: Any) -> Mesh:
    """A mesh of one stage."""
    return Mesh(np.array([device]), ("stage",), axis_types=(AxisType.Auto,))


def turns_program(mesh: Mesh, transport: Any, turns: int) -> Any:
    """A jitted loop that exchanges arrays and adds 1 to each in every turn."""

    def run(arrays: Any, operand: Any) -> Any:
        def turn(_: Any, arrays: Any) -> Any:
            pairs = [[(0, 0)]] * len(arrays)
            # Arrays differ from turn to turn: a stale message would be seen.
            return transport.exchange([x + 1 for x in arrays], pairs, operand, arrays)

        return lax.fori_loop(0, turns, turn, arrays)

    mapped = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(BY_STAGE, transport.operand_spec(mesh)),
        out_specs=BY_STAGE,
        check_vma=False,
    )
    return jax.jit(mapped)


def drawn(mesh: Mesh) -> list[jax.Array]:
    """Random bits of all types."""
    random = np.random.default_rng(0)
    values = [
        random.integers(0, 256, shape[0] * jnp.dtype(dtype).itemsize, np.uint8).view(dtype)
        for shape, dtype in ARRAYS
    ]
    return jax.device_put(values, NamedSharding(mesh, BY_STAGE))


def turn_records(device: Any) -> Iterator[Record]:
    """Every bit of every turn, against sums made on the host."""
    mesh = mesh_of(device)
    transport = PeerStore()
    arrays = drawn(mesh)
    channel = transport.open(mesh, arrays)
    program = turns_program(mesh, transport, TURNS)
    for run in range(2):  # the second goes on with the turns of the first
        started = time.perf_counter()
        found = channel.run(program, arrays)
        seconds = time.perf_counter() - started
        want = [np.asarray(x) + np.asarray(TURNS).astype(x.dtype) for x in arrays]
        same = [bool((np.asarray(x) == y).all()) for x, y in zip(found, want, strict=True)]
        yield _about("turns") | {"run": run, "turns": TURNS, "same": same, "seconds": seconds}


def wait_records(device: Any) -> Iterator[Record]:
    """A device that nobody sends to, twice: the exception, its time, and counters from zero."""
    mesh = mesh_of(device)
    transport = PeerStore(wait_seconds=WAIT_SECONDS)
    arrays = drawn(mesh)
    channel = transport.open(mesh, arrays)
    ordinals = np.array([[device.local_hardware_id]] * 2)
    channel.make_mailboxes = lambda _, layout: Deaf(CudaDriver.load(), ordinals, layout)
    program = turns_program(mesh, transport, 100)
    for run in range(2):
        started = time.perf_counter()
        try:
            channel.run(program, arrays)
            error = turn = None
        except TransportError as raised:
            error, turn = str(raised), raised.turn
        seconds = time.perf_counter() - started
        yield _about("wait") | {"run": run, "error": error, "turn": turn, "seconds": seconds}


def ring_records(settings: Settings) -> Iterator[Record]:
    """A ring of one stage, its tokens with and without the kernel, and seconds per step."""
    is_gpu = settings.scale == "gpu"
    rounds = LONG_ROUNDS if is_gpu else 4
    base = models()["8 x d=512"] if is_gpu else toy_model(1)
    trial = Trial(replace(base, layers=4, batch=16), jax.local_devices()[:1], rounds)
    transports: Sequence[Any] = [Permute(), SelfStore()] if is_gpu else [Permute(), Permute()]
    for record in trial.compare(transports):
        yield record | {"transport": type(record["transport"]).__name__}


def _about(kind: str) -> Record:
    return {"kind": kind, "part": "self", "strategy": "layer-wise", "transport": "PeerStore"}
