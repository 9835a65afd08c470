"""Peer-store transport: messages as stores into the peer's memory, from a kernel of the loop.

XLA sees a kernel and no collective, so it records the whole loop body as one CUDA graph. See
`ptx.py` for the protocol and `mailbox.py` for the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from layerwise_jax._jax import inline_ptx_kernel
from layerwise_jax.decode.transport.interface import Pairs
from layerwise_jax.decode.transport.mailbox import TABLE_WORDS, Mailboxes, exclusive
from layerwise_jax.decode.transport.ptx import BLOCK_THREADS, MailboxLayout, exchange_ptx
from layerwise_jax.decode.transport.words import from_words, to_words, wire_bytes
from layerwise_jax.mesh import STAGE
from layerwise_jax.xla.cuda_driver import CudaDriver

# Longer than any device may lag behind: loading kernels, recording graphs.
WAIT_SECONDS = 20.0
# Mosaic counts threads in warpgroups; CUDA allows so many a block.
WARPGROUP = 128
MAX_THREADS = 1024

MailboxMaker = Callable[[np.ndarray, MailboxLayout], Mailboxes]


@dataclass(frozen=True)
class PeerStore:
    """Transport by one kernel a message, for CUDA devices of one process with peer access.

    Attributes:
      wait_seconds: the longest wait for a message; a `TransportError` follows.
      block_threads: CUDA threads of a block of the kernel.
    """

    wait_seconds: float = WAIT_SECONDS
    block_threads: int = BLOCK_THREADS

    def __post_init__(self) -> None:
        if not self.wait_seconds > 0:
            raise ValueError(f"wait_seconds must be more than 0, got {self.wait_seconds!r}.")
        if self.block_threads not in range(WARPGROUP, MAX_THREADS + 1, WARPGROUP):
            raise ValueError(
                f"block_threads must be a multiple of {WARPGROUP} up to {MAX_THREADS}, got "
                f"{self.block_threads!r}."
            )

    @property
    def tokens_ride(self) -> bool:
        return False

    def operand_spec(self, mesh: Mesh) -> PartitionSpec:
        return PartitionSpec(*mesh.axis_names)

    def exchange(
        self, arrays: Sequence[Any], pairs: Sequence[Pairs], operand: Any, arrived: Sequence[Any]
    ) -> list[Any]:
        layout = self._layout(arrays, lax.axis_size(STAGE))
        # An empty array has no words; it arrives as it is.
        sent = [to_words(x) for x in arrays if x.size]
        after = min(arrived, key=lambda x: x.size)
        taken = iter(self.move(sent, layout, operand.reshape(-1), after))
        return [from_words(next(taken), x) if x.size else x for x in arrays]

    def move(self, sent: Sequence[Any], layout: MailboxLayout, table: Any, after: Any) -> list[Any]:
        """Run the kernel: words of the arrays that arrive, given those to send.

        It does not read `after`, the smallest array of the exchange before; the operand keeps two
        exchanges in order, since both count turns in the same memory.
        """
        kernel = inline_ptx_kernel(
            exchange_ptx(layout, self.wait_seconds),
            [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in sent],
            num_blocks=layout.num_blocks,
            block_threads=layout.block_threads,
        )
        return kernel(*sent, table, unread=(after,))

    def open(self, mesh: Mesh, avals: Sequence[Any]) -> PeerChannel:
        return PeerChannel(self, mesh, self._layout(avals, mesh.shape[STAGE]))

    def _layout(self, arrays: Sequence[Any], num_stages: int) -> MailboxLayout:
        sizes = [wire_bytes(x) for x in arrays]
        return MailboxLayout.of(sizes, num_stages, self.block_threads)


@dataclass(eq=False)
class PeerChannel:
    """The mailboxes of one ring, allocated when it first runs and freed with it.

    Attributes:
      transport: the transport.
      mesh: the ring's mesh.
      layout: sizes of a message.
      make_mailboxes: allocates mailboxes on devices given by their ordinals.
    """

    transport: PeerStore
    mesh: Mesh
    layout: MailboxLayout
    make_mailboxes: MailboxMaker = lambda *sizes: Mailboxes(CudaDriver.load(), *sizes)

    @property
    def operand_type(self) -> jax.ShapeDtypeStruct:
        # A type, so that programs compile before mailboxes exist, and for absent devices.
        shape = (*self.mesh.devices.shape, TABLE_WORDS)
        return jax.ShapeDtypeStruct(shape, jnp.uint32, sharding=self._sharding)

    def run(self, program: Any, *inputs: Any) -> Any:
        with exclusive(self.mesh.devices.flat):
            self.mailboxes.begin()
            # All devices must have finished before another ring may use them.
            outputs = jax.block_until_ready(program(*inputs, self._table))
            self.mailboxes.check(self.transport.wait_seconds)
        return outputs

    @cached_property
    def mailboxes(self) -> Mailboxes:
        """The mailboxes, stages on the first axis."""
        # [stages, *other axes]
        devices = np.moveaxis(self.mesh.devices, self._stage_axis, 0)
        ordinals = np.vectorize(lambda device: device.local_hardware_id, otypes=[int])(devices)
        return self.make_mailboxes(ordinals.reshape(len(devices), -1), self.layout)

    @cached_property
    def _table(self) -> jax.Array:
        """uint32[*mesh, 10]: every device's addresses, on that device."""
        moved = np.moveaxis(self.mesh.devices, self._stage_axis, 0).shape
        # [stages, *other axes, words]
        table = self.mailboxes.table().reshape(*moved, TABLE_WORDS)
        return jax.device_put(np.moveaxis(table, 0, self._stage_axis), self._sharding)

    @property
    def _stage_axis(self) -> int:
        return self.mesh.axis_names.index(STAGE)

    @property
    def _sharding(self) -> NamedSharding:
        return NamedSharding(self.mesh, self.transport.operand_spec(self.mesh))
