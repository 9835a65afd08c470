"""Transports: how the devices of a ring pass a tick's message to the next stage.

A `Transport` is a value that says how; the loop calls its `exchange` inside `shard_map`. A
`Channel` is what one compiled ring holds for it on its devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jax import lax
from jax.sharding import Mesh

from layerwise_jax.mesh import STAGE

Pairs = Sequence[tuple[int, int]]


class Channel(Protocol):
    """The transport's resources of one ring, and the running of its programs.

    Attributes:
      operand_type: the type of the operand that programs take for the transport; None for none.
    """

    @property
    def operand_type(self) -> Any: ...

    def run(self, program: Any, *inputs: Any) -> Any:
        """The outputs of `program(*inputs, operand)`.

        Raises:
          TransportError: a message did not arrive.
        """
        ...


class Transport(Protocol):
    """Interface of a transport: sends each device's message to the next stage."""

    @property
    def tokens_ride(self) -> bool:
        """True if every array costs a collective, so that tokens ride in an activation."""
        ...

    def operand_spec(self, mesh: Mesh) -> Any:
        """The PartitionSpec of the channel's operand; None for none."""
        ...

    def exchange(
        self, arrays: Sequence[Any], pairs: Sequence[Pairs], operand: Any, arrived: Sequence[Any]
    ) -> list[Any]:
        """Send this device's arrays and return those that arrive; all devices call it together.

        Args:
          arrays: what this device sends.
          pairs: for every array, the (sender, receiver) pairs that it counts for; elsewhere it
            arrives with any content.
          operand: this device's part of the channel's operand.
          arrived: what the exchange before returned, which orders the two.
        """
        ...

    def open(self, mesh: Mesh, avals: Sequence[Any]) -> Channel:
        """A channel for messages of arrays of these types over the axis `stage` of a mesh."""
        ...


@dataclass(frozen=True)
class Permute:
    """One `ppermute` an array: any platform, any number of processes."""

    @property
    def tokens_ride(self) -> bool:
        return True

    def operand_spec(self, mesh: Mesh) -> None:
        return None

    def exchange(
        self, arrays: Sequence[Any], pairs: Sequence[Pairs], operand: Any, arrived: Sequence[Any]
    ) -> list[Any]:
        # Devices without a sender get zeros.
        return [lax.ppermute(x, STAGE, list(of_x)) for x, of_x in zip(arrays, pairs, strict=True)]

    def open(self, mesh: Mesh, avals: Sequence[Any]) -> PermuteChannel:
        return PermuteChannel()


@dataclass(frozen=True)
class PermuteChannel:
    """Channel of `Permute`: without resources, since XLA's collectives own their buffers."""

    @property
    def operand_type(self) -> None:
        return None

    def run(self, program: Any, *inputs: Any) -> Any:
        return program(*inputs, None)
