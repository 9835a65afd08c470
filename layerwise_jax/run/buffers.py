"""What a device keeps from tick to tick, changed in place: buffers, outputs so far, accumulators.

Every buffer has one slot more than the schedule uses: what is for no one goes there, and nothing
reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from layerwise_jax.run.wire import fill, to_wire


def empty_buffers(avals: Sequence[Any], num_slots: int, value: float) -> list[Any]:
    """A buffer for each type, filled with what bubbles compute on."""
    return [
        fill(jax.ShapeDtypeStruct((num_slots + 1, *aval.shape), aval.dtype), value)
        for aval in avals
    ]


def store(buffers: Sequence[Any], slot: Any, values: Sequence[Any]) -> list[Any]:
    """Each value into its buffer's slot; slot -1 is the last, which nothing reads."""
    return [
        lax.dynamic_update_index_in_dim(
            buffer, to_wire(x), jnp.where(slot < 0, buffer.shape[0] - 1, slot), 0
        )
        for buffer, x in zip(buffers, values, strict=True)
    ]


def load(buffers: Sequence[Any], slot: Any) -> list[Any]:
    """The slot of every buffer."""
    return [
        lax.dynamic_index_in_dim(
            buffer, jnp.where(slot < 0, buffer.shape[0] - 1, slot), 0, keepdims=False
        )
        for buffer in buffers
    ]


def do_if[T](condition: Any, run: Callable[[T], T], carry: T) -> T:
    """`run(carry)` if the condition holds, else the carry.

    A loop of one turn or none. XLA updates the carry of a loop in place, whereas a branch returns
    all of its results in buffers of their own, so that gradients that are only handed through would
    be copied in every tick.
    """
    return lax.while_loop(
        lambda state: state[0], lambda state: (jnp.bool_(False), run(state[1])), (condition, carry)
    )[1]
