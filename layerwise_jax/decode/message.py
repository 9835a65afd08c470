"""Ring message: packs activations for the next stage and sampled tokens for stage 0.

Where every array costs a collective, tokens ride in an activation: the last stage sends no
activations, so its array is free to carry them. That array is sent as unsigned integers of its
width, since a bit pattern that is a signalling NaN may not survive arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from layerwise_jax.run.stage import LocalStage
from layerwise_jax.run.wire import to_wire, wire_aval
from layerwise_jax.stage.staged_program import StagedProgram

TOKEN_BYTES = 4


@dataclass(frozen=True)
class Message:
    """The arrays that a tick sends.

    Attributes:
      lanes_avals: types of the lanes' values.
      carrier: the lane in whose array tokens ride; None if tokens are an array by themselves.
      num_sequences: tokens of a message, one a sequence.
      pairs: for every array, its (sender, receiver) pairs.
    """

    lanes_avals: tuple[Any, ...]
    carrier: int | None
    num_sequences: int
    pairs: tuple[tuple[tuple[int, int], ...], ...]

    @classmethod
    def of(cls, loop: StagedProgram, tokens_ride: bool = True) -> Message:
        """The message of a ring's stages.

        Args:
          loop: the stages.
          tokens_ride: whether tokens are written into an activation, where one is large enough.
        """
        avals = tuple(lane.aval for lane in loop.wiring.lanes)
        num_sequences = loop.output_aval(0).shape[0]
        ring = tuple((s, (s + 1) % loop.num_stages) for s in range(loop.num_stages))
        # The first array that has TOKEN_BYTES a sequence.
        fits = [j for j, aval in enumerate(avals) if _carries(wire_aval(aval), num_sequences)]
        carrier = fits[0] if fits and tokens_ride else None
        pairs = [tuple(lane.pairs(loop.num_stages)) for lane in loop.wiring.lanes]
        if carrier is None:
            pairs.append(((loop.num_stages - 1, 0),))
        else:
            pairs[carrier] = ring
        return cls(avals, carrier, num_sequences, tuple(pairs))

    @property
    def avals(self) -> list[Any]:
        """Types of the arrays that are sent."""
        sent = [wire_aval(aval) for aval in self.lanes_avals]
        if self.carrier is None:
            return [*sent, jax.ShapeDtypeStruct((self.num_sequences,), jnp.int32)]
        carrier = sent[self.carrier]
        sent[self.carrier] = jax.ShapeDtypeStruct(carrier.shape, _bits(carrier.dtype))
        return sent

    def pack(self, lanes: Sequence[Any], tokens: Any, device: LocalStage) -> list[Any]:
        """The arrays to send, given the lanes' values and the last stage's tokens."""
        sent = [to_wire(x) for x in lanes]
        if self.carrier is None:
            return [*sent, tokens]
        carrier = sent[self.carrier]
        bits = lax.bitcast_convert_type(carrier, _bits(carrier.dtype))
        # Only the last stage overwrites; the others send their activations.
        is_last = device.stage == device.loop.num_stages - 1
        sent[self.carrier] = jnp.where(is_last, _spread(tokens, bits), bits)
        return sent

    def lanes(self, arrived: Sequence[Any]) -> list[Any]:
        """The lanes' values of a message, random keys as their data."""
        values = list(arrived[: len(self.lanes_avals)])
        if self.carrier is not None:
            aval = wire_aval(self.lanes_avals[self.carrier])
            values[self.carrier] = lax.bitcast_convert_type(values[self.carrier], aval.dtype)
        return values

    def tokens(self, arrived: Sequence[Any]) -> Any:
        """int32[sequences]: the tokens of a message that arrived at the first stage."""
        if self.carrier is None:
            return arrived[-1]
        bits = arrived[self.carrier].reshape(self.num_sequences, -1)  # [sequences, elements]
        parts = [bits[:, i].astype(jnp.uint32) for i in range(_parts_of(bits.dtype))]
        # Shifts and ors fuse; a bitcast to another width is a separate kernel on a GPU.
        joined = reduce(
            jnp.bitwise_or, [part << (8 * bits.dtype.itemsize * i) for i, part in enumerate(parts)]
        )
        return joined.astype(jnp.int32)


def _carries(aval: Any, num_sequences: int) -> bool:
    """True if an array is [sequences, ...] with at least `TOKEN_BYTES` a sequence."""
    itemsize = np.dtype(aval.dtype).itemsize
    has_sequences = aval.shape[:1] == (num_sequences,)
    row_bytes = int(np.prod(aval.shape[1:])) * itemsize
    return has_sequences and itemsize in (2, 4) and row_bytes >= TOKEN_BYTES


def _bits(dtype: Any) -> Any:
    return jnp.dtype(f"uint{np.dtype(dtype).itemsize * 8}")


def _spread(tokens: Any, like: Any) -> Any:
    """`like` with a token in the first elements of every sequence, lowest bits first."""
    rows = like.reshape(like.shape[0], -1)  # [sequences, elements]
    column = lax.broadcasted_iota(jnp.int32, rows.shape, 1)
    for i in range(_parts_of(like.dtype)):
        part = (tokens.astype(jnp.uint32) >> (8 * like.dtype.itemsize * i)).astype(like.dtype)
        rows = jnp.where(column == i, part[:, None], rows)
    return rows.reshape(like.shape)


def _parts_of(dtype: Any) -> int:
    """Number of elements that a token takes."""
    return TOKEN_BYTES // dtype.itemsize
