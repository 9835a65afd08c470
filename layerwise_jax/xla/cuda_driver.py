"""CUDA driver through ctypes: memory outside of XLA's pool, and access between peer devices."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LIBRARY = "libcuda.so.1"
PEER_ACCESS_ALREADY_ENABLED = 704
# cuMemHostAlloc: pinned for all contexts, and mapped into the devices' address space.
HOST_PORTABLE_AND_MAPPED = 1 | 2


class CudaDriverError(RuntimeError):
    """The CUDA driver is missing or refused a call."""


class CudaDriver:
    """The driver calls that mailboxes need. Devices are given by their CUDA ordinal.

    Addresses are ints. Memory that this class allocates is the caller's to free.
    """

    def __init__(self, library: Any):
        self._library = library
        self._contexts: dict[int, ctypes.c_void_p] = {}
        self._call("cuInit", ctypes.c_uint(0))

    @classmethod
    def load(cls) -> CudaDriver:
        """The installed driver.

        Raises:
          CudaDriverError: there is none.
        """
        try:
            return cls(ctypes.CDLL(LIBRARY))
        except OSError as error:
            raise CudaDriverError(f"{LIBRARY} cannot be loaded: {error}") from error

    def can_access_peer(self, ordinal: int, peer: int) -> bool:
        """True if a device can read and write another device's memory."""
        answer = ctypes.c_int()
        handles = (self._device(ordinal), self._device(peer))
        self._call("cuDeviceCanAccessPeer", ctypes.byref(answer), *handles)
        return bool(answer.value)

    def enable_peer_access(self, ordinal: int, peer: int) -> None:
        """Map a peer's memory into a device's address space."""
        context = self._context(peer)
        with self._current(ordinal):
            allowed = (PEER_ACCESS_ALREADY_ENABLED,)
            self._call("cuCtxEnablePeerAccess", context, ctypes.c_uint(0), allowed=allowed)

    def allocate(self, ordinal: int, size: int) -> int:
        """Device memory, zeroed."""
        address = ctypes.c_uint64()
        with self._current(ordinal):
            self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        self.zero(ordinal, address.value, size)
        return address.value

    def zero(self, ordinal: int, address: int, size: int) -> None:
        """Set device memory to zeros, after all work that the device was given."""
        with self._current(ordinal):
            self._call("cuCtxSynchronize")
            byte = ctypes.c_ubyte(0)
            self._call("cuMemsetD8_v2", ctypes.c_uint64(address), byte, ctypes.c_size_t(size))
            # XLA's streams do not wait for the default stream, in which this runs.
            self._call("cuCtxSynchronize")

    def write_word(self, ordinal: int, address: int, word: int) -> None:
        """Write one uint32 into device memory."""
        with self._current(ordinal):
            count = ctypes.c_size_t(1)
            self._call("cuMemsetD32_v2", ctypes.c_uint64(address), ctypes.c_uint(word), count)
            self._call("cuCtxSynchronize")

    def free(self, ordinal: int, address: int) -> None:
        """Give device memory back."""
        with self._current(ordinal):
            self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def allocate_host(self, ordinal: int, size: int) -> int:
        """Pinned host memory, zeroed, at one address for the host and all devices."""
        address = ctypes.c_void_p()
        with self._current(ordinal):
            flags = ctypes.c_uint(HOST_PORTABLE_AND_MAPPED)
            self._call("cuMemHostAlloc", ctypes.byref(address), ctypes.c_size_t(size), flags)
        assert address.value is not None
        ctypes.memset(address.value, 0, size)
        return address.value

    def free_host(self, ordinal: int, address: int) -> None:
        """Give pinned host memory back."""
        with self._current(ordinal):
            self._call("cuMemFreeHost", ctypes.c_void_p(address))

    def _device(self, ordinal: int) -> ctypes.c_int:
        handle = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(handle), ctypes.c_int(ordinal))
        return handle

    def _context(self, ordinal: int) -> ctypes.c_void_p:
        """The device's primary context, which XLA uses too. It is retained for good."""
        if ordinal not in self._contexts:
            context = ctypes.c_void_p()
            device = self._device(ordinal)
            self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
            self._contexts[ordinal] = context
        return self._contexts[ordinal]

    @contextmanager
    def _current(self, ordinal: int) -> Iterator[None]:
        """Make a device's context current for the calling thread, and restore the former one."""
        self._call("cuCtxPushCurrent_v2", self._context(ordinal))
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def _call(self, name: str, *arguments: Any, allowed: tuple[int, ...] = ()) -> None:
        code = getattr(self._library, name)(*arguments)
        if code != 0 and code not in allowed:
            raise CudaDriverError(f"{name} failed with CUDA error {code}.")
