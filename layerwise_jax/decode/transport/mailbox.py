"""Mailboxes of the peer-store transport: device memory that a ring's devices write into each other.

A device has a mailbox, which its sender writes, control words (its failure flag and turn counters),
and a report in pinned host memory, which it writes only when a wait fails.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from layerwise_jax.decode.transport.ptx import TABLE_ADDRESSES, MailboxLayout
from layerwise_jax.xla.cuda_driver import CudaDriver

REPORT_BYTES = 4
# JAX without x64 has no 64-bit integers: an address is two uint32.
TABLE_WORDS = 2 * TABLE_ADDRESSES

# One lock a device of this process, by `device.id`. Two rings that were enqueued in another order
# on two of their devices would wait for each other, so their calls take turns.
_LOCKS: dict[int, threading.Lock] = {}


class TransportError(RuntimeError):
    """A stage's wait for the message of the stage before it has timed out.

    Attributes:
      waiting: the stage that waited.
      silent: the stage whose message did not arrive.
      turn: which message of the ring, counted from 1.
    """

    def __init__(self, waiting: int, silent: int, turn: int, wait_seconds: float):
        super().__init__(
            f"Stage {waiting} got no message from stage {silent} within {wait_seconds:g} s (message"
            f" {turn} of this ring). The state that was passed in is lost: start again with"
            " ring.start or ring.generate. If a stage takes this long, pass"
            " transport=PeerStore(wait_seconds=...)."
        )
        self.waiting = waiting
        self.silent = silent
        self.turn = turn


class Mailboxes:
    """The mailboxes of one ring. They are freed with this object.

    Attributes:
      ordinals: int[stages, replicas], the CUDA ordinals of the devices. Column r is a ring: its
        device at stage s sends to the one at stage s + 1, the last to the first.
      layout: sizes.
    """

    def __init__(self, driver: CudaDriver, ordinals: np.ndarray, layout: MailboxLayout):
        self.ordinals = ordinals
        self.layout = layout
        self._driver = driver
        self._is_clean = True
        self._first = int(ordinals.flat[0])  # any device's context serves for host memory
        self._device_memory: list[tuple[int, int, int]] = []  # (ordinal, address, bytes)
        self._host_memory: list[tuple[int, int]] = []
        # Registered before anything is allocated, so that a failure half way frees the first half.
        free = weakref.finalize(self, _free, driver, self._device_memory, self._host_memory)
        free.atexit = False  # the process's end frees it, perhaps before this could run
        self._boxes = self._allocate(layout.mailbox_bytes)
        self._control = self._allocate(layout.control_bytes)
        reports = driver.allocate_host(self._first, REPORT_BYTES * ordinals.size)
        self._host_memory.append((self._first, reports))
        at = REPORT_BYTES * np.arange(ordinals.size, dtype=np.uint64).reshape(ordinals.shape)
        self._report_addresses = np.uint64(reports) + at
        self._reports = (ctypes.c_uint32 * ordinals.size).from_address(reports)
        for own, peer in zip(ordinals.flat, np.roll(ordinals, -1, axis=0).flat, strict=True):
            # A ring of one stage is its own peer.
            if own != peer:
                driver.enable_peer_access(int(own), int(peer))

    def table(self) -> np.ndarray:
        """uint32[stages, replicas, 10]: every device's addresses, low words first."""
        columns = (
            self._boxes,
            np.roll(self._boxes, -1, axis=0),  # the receiver's
            self._control,
            np.roll(self._control, -1, axis=0),
            self._report_addresses,
        )
        return np.ascontiguousarray(np.stack(columns, axis=-1)).view(np.uint32)

    def begin(self) -> None:
        """Prepare for a run. After a run that did not end well, turns and mailboxes are zeroed."""
        if not self._is_clean:
            self.reset()
        self._is_clean = False

    def check(self, wait_seconds: float) -> None:
        """End a run.

        Raises:
          TransportError: a device's wait timed out.
        """
        reports = np.array(self._reports).reshape(self.ordinals.shape)  # turns; 0 where all is well
        if not reports.any():
            self._is_clean = True
            return
        # The first to fail has the least turn: those behind it waited a turn longer.
        turn = reports[reports > 0].min()
        waiting = int(np.argwhere(reports == turn)[0, 0])
        silent = (waiting - 1) % len(self.ordinals)
        raise TransportError(waiting, silent, int(turn), wait_seconds)

    def reset(self) -> None:
        """Zero all memory, once the devices have finished what they were given."""
        for ordinal, address, size in self._device_memory:
            self._driver.zero(ordinal, address, size)
        ctypes.memset(self._reports, 0, ctypes.sizeof(self._reports))
        self._is_clean = True

    def silence(self, stage: int) -> None:
        """Stop a stage from sending in the next run, as if it had failed: for tests of the wait."""
        for ordinal, address in zip(self.ordinals[stage], self._control[stage], strict=True):
            self._driver.write_word(int(ordinal), int(address), 1)

    def _allocate(self, size: int) -> np.ndarray:
        """uint64[stages, replicas]: addresses of zeroed memory on every device."""
        addresses = np.zeros(self.ordinals.shape, np.uint64)
        for index, ordinal in np.ndenumerate(self.ordinals):
            address = self._driver.allocate(int(ordinal), size)
            self._device_memory.append((int(ordinal), address, size))
            addresses[index] = address
        return addresses


def _free(
    driver: CudaDriver,
    device_memory: Iterable[tuple[int, int, int]],
    host_memory: Iterable[tuple[int, int]],
) -> None:
    for ordinal, address, _ in device_memory:
        driver.free(ordinal, address)
    for ordinal, address in host_memory:
        driver.free_host(ordinal, address)


@contextmanager
def exclusive(devices: Iterable[Any]) -> Iterator[None]:
    """Hold the locks of these devices, taken in one order so that no two callers deadlock."""
    with ExitStack() as stack:
        for number in sorted({device.id for device in devices}):
            stack.enter_context(_LOCKS.setdefault(number, threading.Lock()))
        yield
