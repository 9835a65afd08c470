"""The ring's message in a loop without any other work, for each transport."""

import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from layerwise_jax.decode import PeerStore, Permute

# Bytes of a message, messages of an iteration, and CUDA threads of a block of the peer store.
SIZES = (16_384, 131_072)
PER_ITERATION = (1, 4)
BLOCKS = (128, 256, 1024)
ITERATIONS = (500, 2_000)
REPEATS = 7


def message_records(devices: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Seconds per message, by size, transport and messages per iteration."""
    mesh = Mesh(np.array(devices), ("stage",), axis_types=(AxisType.Auto,))
    is_gpu = devices[0].platform == "gpu"
    transports: list[Any] = [Permute()]
    if is_gpu:
        transports += [PeerStore(block_threads=threads) for threads in BLOCKS]
    for size in SIZES if is_gpu else SIZES[:1]:
        for count in PER_ITERATION:
            for transport in transports:
                seconds, spread = _seconds(mesh, transport, size, count)
                yield {
                    "kind": "message",
                    "part": "transport",
                    "strategy": "layer-wise",
                    "transport": "permute" if isinstance(transport, Permute) else "peer_store",
                    "block_threads": getattr(transport, "block_threads", None),
                    "bytes": size,
                    "messages_an_iteration": count,
                    "seconds_per_step": seconds,
                    "spread": spread,
                }


def _seconds(mesh: Mesh, transport: Any, size: int, count: int) -> tuple[float, list[float]]:
    """Median, minimum and maximum of a message's seconds."""
    stages = mesh.size
    pairs = [(s, (s + 1) % stages) for s in range(stages)]
    aval = jax.ShapeDtypeStruct((size // 2,), jnp.bfloat16)
    channel = transport.open(mesh, [aval])
    by_stage = PartitionSpec("stage")

    def run(x: Any, operand: Any, iterations: int) -> Any:
        def body(_: Any, x: Any) -> Any:
            for _ in range(count):
                (x,) = transport.exchange([x * 0.5 + 1], [pairs], operand, [x])
            return x

        return lax.fori_loop(0, iterations, body, x)

    programs = {}
    for iterations in ITERATIONS:
        mapped = jax.shard_map(
            lambda x, operand, n=iterations: run(x, operand, n),
            mesh=mesh,
            in_specs=(by_stage, transport.operand_spec(mesh)),
            out_specs=by_stage,
            check_vma=False,
        )
        programs[iterations] = jax.jit(mapped)
    x = jax.device_put(jnp.ones((stages * aval.size,), aval.dtype), NamedSharding(mesh, by_stage))
    times = {n: [_timed(channel, programs[n], x) for _ in range(REPEATS + 1)] for n in ITERATIONS}
    short, long = (np.array(times[n][1:]) for n in ITERATIONS)  # the first one compiles
    each = (long - short) / (count * (ITERATIONS[1] - ITERATIONS[0]))
    return statistics.median(each), [float(each.min()), float(each.max())]


def _timed(channel: Any, program: Any, x: Any) -> float:
    started = time.perf_counter()
    jax.block_until_ready(channel.run(program, x))
    return time.perf_counter() - started
