"""Persistent kernel that reads a working set repeatedly, and its bandwidth."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

# Eight programs of four warps on a multiprocessor, 4 KiB each: 32 KiB on their way at a time, all
# programs resident.
PROGRAMS = 8
WARPS = 4
BLOCK = 1024
BLOCK_BYTES = 4 * BLOCK

REPEATS = 4
MIB = 2**20


class Reading(NamedTuple):
    """One point of the curve: bytes of the working set, and bytes read per second."""

    working_set: int
    bandwidth: float


# Reads the first `rounds` rounds of an array `passes` times; (array, [rounds, passes]) to what was
# summed.
Reader = Callable[[jax.Array, jax.Array], jax.Array]


def persistent_reader(programs: int, interpret: bool = False) -> Reader:
    """The kernel; a program reads the same blocks in every pass, as a resident stage does.

    A round is one block of every program, programs side by side. How many rounds and passes is
    data, so that one compilation serves the whole curve. The sums are returned so that nothing read
    is dead.
    """
    kernel = functools.partial(_read_blocks, programs=programs, interpret=interpret)
    return pl.pallas_call(
        kernel,
        grid=(programs,),
        out_shape=jax.ShapeDtypeStruct((programs * BLOCK,), jnp.float32),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(memory_space=pl.ANY)],
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        compiler_params=triton.CompilerParams(num_warps=WARPS),
        interpret=interpret,
    )


def _read_blocks(data, counts, out, *, programs, interpret):
    program = pl.program_id(0)
    rounds, passes = counts[0], counts[1]

    def one_block(r, total):
        block = data.at[pl.ds((r * programs + program) * BLOCK, BLOCK)]
        # A volatile read is served by L2: a small working set would otherwise stay in the
        # multiprocessors' own caches.
        return total + (block[...] if interpret else triton.load(block, volatile=True))

    def one_pass(_, total):
        return lax.fori_loop(0, rounds, one_block, total)

    out[pl.ds(program * BLOCK, BLOCK)] = lax.fori_loop(
        0, passes, one_pass, jnp.zeros((BLOCK,), jnp.float32)
    )


def plain_reader(programs: int) -> Reader:
    """The same reads and sums in plain JAX: for a CPU, and as the reference of the kernel's
    test.
    """

    def read(data: jax.Array, counts: jax.Array) -> jax.Array:
        def one_round(r, total):
            return total + lax.dynamic_slice(data, (r * programs * BLOCK,), (programs * BLOCK,))

        def one_pass(_, total):
            # Without the barrier the sum over the rounds does not depend on the pass and is taken
            # out of the loop.
            return lax.fori_loop(0, counts[0], one_round, lax.optimization_barrier(total))

        return lax.fori_loop(0, counts[1], one_pass, jnp.zeros((programs * BLOCK,), jnp.float32))

    return read


def round_counts(programs: int, smallest: int, largest: int) -> list[int]:
    """Rounds of working sets from `smallest` to `largest` bytes; large ones in 20 % steps."""
    round_bytes = programs * BLOCK_BYTES
    counts = [max(1, round(smallest / round_bytes))]
    while counts[-1] * round_bytes < largest:
        counts.append(max(counts[-1] + 1, int(counts[-1] * 1.2)))
    return counts


def read_curve(
    reader: Reader,
    programs: int,
    counts: Sequence[int],
    bytes_each: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Reading]:
    """Bandwidth by working set, the best of a few runs of about `bytes_each` bytes.

    Raises:
      RuntimeError: the kernel did not read what it should.
    """
    round_bytes = programs * BLOCK_BYTES
    data = jnp.ones((max(counts) * programs * BLOCK,), jnp.float32)
    read = jax.jit(reader)
    readings = []
    for rounds in counts:
        passes = max(2, bytes_each // (rounds * round_bytes))
        arguments = data, jnp.array([rounds, passes], jnp.int32)
        summed = read(*arguments)
        if not (summed == rounds * passes).all():
            raise RuntimeError(
                f"sums of {passes} passes over {rounds} rounds of ones must be {rounds * passes}, "
                f"got {summed[:4]}. The kernel does not read what it should."
            )
        seconds = min(
            _seconds(lambda arguments=arguments: read(*arguments), clock) for _ in range(REPEATS)
        )
        readings.append(Reading(rounds * round_bytes, rounds * passes * round_bytes / seconds))
    return readings


def _seconds(run: Callable[[], jax.Array], clock: Callable[[], float]) -> float:
    started = clock()
    run().block_until_ready()
    return clock() - started
