"""A CUDA driver library in Python: device memory is host memory, and every call is recorded."""

import ctypes
from typing import Any


class FakeCuda:
    """Stands for the object that `ctypes.CDLL` returns.

    Attributes:
      memory: buffers by address, of devices and of the host.
      calls: names of the calls, in order.
      current: the stack of contexts; a context's handle is its device's ordinal plus 100.
      unreachable: (device, peer) pairs without access.
      limit: bytes after which allocations fail.
    """

    def __init__(self, unreachable: Any = (), limit: int = 2**30):
        self.memory: dict[int, Any] = {}
        self.calls: list[str] = []
        self.current: list[int] = []
        self.unreachable = set(unreachable)
        self.limit = limit
        self.peers: set[tuple[int, int]] = set()

    def __getattr__(self, name: str) -> Any:
        act = getattr(type(self), f"_{name}", None)

        def call(*arguments: Any) -> int:
            self.calls.append(name)
            return (act(self, *arguments) if act else 0) or 0

        return call

    def _cuDeviceGet(self, handle: Any, ordinal: Any) -> None:
        handle._obj.value = ordinal.value

    def _cuDeviceCanAccessPeer(self, answer: Any, device: Any, peer: Any) -> None:
        answer._obj.value = int((device.value, peer.value) not in self.unreachable)

    def _cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> None:
        context._obj.value = device.value + 100

    def _cuCtxPushCurrent_v2(self, context: Any) -> None:
        self.current.append(context.value)

    def _cuCtxPopCurrent_v2(self, context: Any) -> None:
        self.current.pop()

    def _cuCtxEnablePeerAccess(self, peer: Any, flags: Any) -> int:
        pair = (self.current[-1] - 100, peer.value - 100)
        known = pair in self.peers
        self.peers.add(pair)
        return 704 if known else 0

    def _cuMemAlloc_v2(self, address: Any, size: Any) -> int:
        if sum(map(len, self.memory.values())) + size.value > self.limit:
            return 2  # out of memory
        buffer = ctypes.create_string_buffer(b"\xff" * size.value, size.value)
        address._obj.value = ctypes.addressof(buffer)
        self.memory[ctypes.addressof(buffer)] = buffer
        return 0

    def _cuMemHostAlloc(self, address: Any, size: Any, flags: Any) -> int:
        return self._cuMemAlloc_v2(address, size)

    def _cuMemsetD8_v2(self, address: Any, byte: Any, size: Any) -> None:
        ctypes.memset(address.value, byte.value, size.value)

    def _cuMemsetD32_v2(self, address: Any, word: Any, count: Any) -> None:
        ctypes.c_uint32.from_address(address.value).value = word.value

    def _cuMemFree_v2(self, address: Any) -> int:
        return 0 if self.memory.pop(address.value, None) is not None else 1

    def _cuMemFreeHost(self, address: Any) -> int:
        return self._cuMemFree_v2(address)
