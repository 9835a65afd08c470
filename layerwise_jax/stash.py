"""What a device keeps from tick to tick, changed in place: buffers, outputs so far, accumulators.

Every buffer has one slot more than the schedule uses: what is for no one goes there, and nothing reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from layerwise_jax.loop import Loop
from layerwise_jax.on_device import Moment, fill, sum_dtype, to_wire, wire_aval


def empty_buffers(avals: Sequence[Any], num_slots: int, value: float) -> list[Any]:
    """A buffer for each type, filled with what bubbles compute on."""
    return [fill(jax.ShapeDtypeStruct((num_slots + 1, *aval.shape), aval.dtype), value) for aval in avals]


def store(buffers: Sequence[Any], slot: Any, values: Sequence[Any]) -> list[Any]:
    """Each value into its buffer's slot; slot -1 is the last, which nothing reads."""
    return [
        lax.dynamic_update_index_in_dim(buffer, to_wire(x), jnp.where(slot < 0, buffer.shape[0] - 1, slot), 0)
        for buffer, x in zip(buffers, values, strict=True)
    ]


def load(buffers: Sequence[Any], slot: Any) -> list[Any]:
    """The slot of every buffer."""
    return [
        lax.dynamic_index_in_dim(buffer, jnp.where(slot < 0, buffer.shape[0] - 1, slot), 0, keepdims=False)
        for buffer in buffers
    ]


def do_if[T](condition: Any, run: Callable[[T], T], carry: T) -> T:
    """`run(carry)` if the condition holds, else the carry.

    A loop of one turn or none. XLA updates the carry of a loop in place, whereas a branch returns all of its results in
    buffers of their own, so that gradients that are only handed through would be copied in every tick.
    """
    return lax.while_loop(lambda state: state[0], lambda state: (jnp.bool_(False), run(state[1])), (condition, carry))[
        1
    ]


def start_output(loop: Loop, position: int, role: str) -> Any:
    """An output before the first microbatch: "rows" for all of them, "reduced" and "whole" for one."""
    aval = wire_aval(loop.output_aval(position))
    if role == "rows":
        return jnp.zeros((loop.num_microbatches, *aval.shape), aval.dtype)
    return jnp.zeros(aval.shape, sum_dtype(aval.dtype) if role == "reduced" else aval.dtype)


def add_output(role: str, so_far: Any, made: Any, moment: Moment, is_mine: Any) -> Any:
    """An output with what this microbatch made of it, where this device is the one that makes it."""
    is_mine, made = moment.is_active & is_mine, to_wire(made)
    if role == "rows":
        row = jnp.where(is_mine, made, so_far[moment.index])
        return lax.dynamic_update_index_in_dim(so_far, row, moment.index, 0)
    if role == "reduced":
        return so_far + jnp.where(is_mine, made, jnp.zeros_like(made)).astype(so_far.dtype)
    return jnp.where(is_mine & (moment.index == 0), made, so_far)
