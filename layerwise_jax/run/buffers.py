"""Per-device loop-carried buffers, updated in place.

A buffer has a slot for each value that the schedule keeps at once, and a dummy slot behind them:
idle ticks write there and read from there, so that no tick needs a branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from layerwise_jax.run.wire import fill, to_wire


def empty_buffers(avals: Sequence[Any], num_slots: int, value: float) -> list[Any]:
    """A buffer [num_slots + 1, *shape] for each type, filled with the fill value of bubbles."""
    return [
        fill(jax.ShapeDtypeStruct((num_slots + 1, *aval.shape), aval.dtype), value)
        for aval in avals
    ]


def store(buffers: Sequence[Any], slot: Any, values: Sequence[Any]) -> list[Any]:
    """The buffers with a value each written to `slot`; -1 is the dummy slot."""
    return [
        lax.dynamic_update_index_in_dim(buffer, to_wire(x), _index(buffer, slot), 0)
        for buffer, x in zip(buffers, values, strict=True)
    ]


def load(buffers: Sequence[Any], slot: Any) -> list[Any]:
    """The value in `slot` of every buffer; -1 is the dummy slot."""
    return [
        lax.dynamic_index_in_dim(buffer, _index(buffer, slot), 0, keepdims=False)
        for buffer in buffers
    ]


def take(buffers: Sequence[Any], slot: Any) -> tuple[list[Any], list[Any]]:
    """The value in `slot` of every buffer, and the buffers, to be written later in the same tick.

    The barrier has XLA read before it writes. Otherwise a read that is fused into a late consumer
    would keep the old buffer alive, and the write would copy all of it.
    """
    return jax.lax.optimization_barrier((load(buffers, slot), list(buffers)))


def _index(buffer: Any, slot: Any) -> Any:
    # The dummy slot is the last: JAX would read -1 as that too, but clamps a traced index to 0.
    return jnp.where(slot < 0, buffer.shape[0] - 1, slot)
