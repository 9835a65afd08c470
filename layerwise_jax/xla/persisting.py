"""Set-aside of L2 for persisting accesses, through the CUDA runtime."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SetAside:
    """Bytes of L2 set aside: asked for, granted by the driver, and the device's maximum."""

    asked: int
    granted: int
    most: int

    def __str__(self) -> str:
        return (
            f"persisting L2: asked for {self.asked:,} bytes, granted {self.granted:,} of at "
            f"most {self.most:,}"
        )


@contextmanager
def persisting_l2(num_bytes: int, device: int = 0) -> Iterator[SetAside]:
    """Context that sets aside L2 for persisting accesses and restores the former limit.

    Only kernels that mark their accesses as persisting use the set-aside. XLA's kernels do not, and
    have less L2 meanwhile.

    Args:
      num_bytes: bytes to set aside.
      device: the CUDA ordinal of the GPU.

    Raises:
      ImportError: the extra `l2` (cuda-bindings) is not installed.
      RuntimeError: the CUDA runtime reports an error, for example without a GPU.
    """
    runtime = _runtime()
    _checked(runtime, runtime.cudaSetDevice(device))
    limit = runtime.cudaLimit.cudaLimitPersistingL2CacheSize
    attribute = runtime.cudaDeviceAttr.cudaDevAttrMaxPersistingL2CacheSize
    most = _checked(runtime, runtime.cudaDeviceGetAttribute(attribute, device))
    former = _checked(runtime, runtime.cudaDeviceGetLimit(limit))
    _checked(runtime, runtime.cudaDeviceSetLimit(limit, min(num_bytes, most)))
    try:
        yield SetAside(num_bytes, _checked(runtime, runtime.cudaDeviceGetLimit(limit)), most)
    finally:
        _checked(runtime, runtime.cudaCtxResetPersistingL2Cache())
        _checked(runtime, runtime.cudaDeviceSetLimit(limit, former))


def _runtime() -> Any:
    try:
        from cuda.bindings import runtime  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            "The persisting set-aside needs cuda-bindings: pip install 'layerwise-jax[l2]'."
        ) from error
    return runtime


def _checked(runtime: Any, answer: tuple[Any, ...]) -> Any:
    code, *values = answer
    if code != runtime.cudaError_t.cudaSuccess:
        raise RuntimeError(f"The CUDA runtime answered {code}.")
    return values[0] if values else None
