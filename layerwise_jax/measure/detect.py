"""The device at hand, as JAX and its driver report it."""

from __future__ import annotations

import ctypes

from layerwise_jax import processes
from layerwise_jax.cost.device import DeviceSpec
from layerwise_jax.cost.devices import CPU, device_named

# CUdevice_attribute of the CUDA driver API.
MULTIPROCESSOR_COUNT = 16
L2_CACHE_SIZE = 38


def detect_device() -> DeviceSpec:
    """The spec of JAX's first local device.

    A GPU's figures come from the table in `layerwise_jax.devices`, but its cache and
    multiprocessors are as the driver reports them: a part of a GPU (MIG) has a part of both. The
    usable share of the cache is then the table's.

    Raises:
      ValueError: it is neither a CPU nor a GPU of the table.
    """
    device = processes.local_device()
    if device.platform == "cpu":
        return CPU
    reported = _driver_attributes(device.local_hardware_id or 0)
    return (
        as_reported(device_named(device.device_kind), *reported)
        if reported
        else device_named(device.device_kind)
    )


def as_reported(spec: DeviceSpec, l2_bytes: int, multiprocessors: int) -> DeviceSpec:
    """The spec with what a driver reports, where that differs from the table."""
    if (l2_bytes, multiprocessors) == (spec.l2_bytes, spec.multiprocessors):
        return spec
    source = "as the CUDA driver reports it"
    usable = {
        "usable_l2_bytes": (
            f"{spec.sources['usable_l2_bytes']}; taken as a share of the cache reported here"
        )
    }
    return spec.updated(
        l2_bytes=l2_bytes,
        usable_l2_bytes=spec.usable_l2_bytes * l2_bytes // spec.l2_bytes,
        multiprocessors=multiprocessors,
        sources={**spec.sources, "l2_bytes": source, "multiprocessors": source, **usable},
    )


def _driver_attributes(ordinal: int) -> tuple[int, int] | None:
    """(bytes of L2, multiprocessors) of a GPU, or None where there is no CUDA driver to ask."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, l2_bytes, multiprocessors = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    failures = (
        driver.cuInit(0),
        driver.cuDeviceGet(ctypes.byref(device), ordinal),
        driver.cuDeviceGetAttribute(ctypes.byref(l2_bytes), L2_CACHE_SIZE, device),
        driver.cuDeviceGetAttribute(ctypes.byref(multiprocessors), MULTIPROCESSOR_COUNT, device),
    )
    return None if any(failures) else (l2_bytes.value, multiprocessors.value)
