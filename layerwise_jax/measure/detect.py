"""Spec of the local device, from JAX and the CUDA driver."""

from __future__ import annotations

import ctypes

from layerwise_jax import processes
from layerwise_jax.cost.device import DeviceSpec
from layerwise_jax.cost.devices import CPU, device_named

# CUdevice_attribute of the CUDA driver API.
MULTIPROCESSOR_COUNT = 16
L2_CACHE_SIZE = 38


def detect_device() -> DeviceSpec:
    """Spec of JAX's first local device.

    A GPU's numbers come from `layerwise_jax.cost.devices`. Bytes of L2 and the number of
    multiprocessors come from the CUDA driver, since a MIG slice has a part of both; the usable
    fraction of L2 stays the table's.

    Raises:
      ValueError: the device is neither a CPU nor a GPU of the table.
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
    """Spec with the driver's bytes of L2 and multiprocessors, where they differ from the table."""
    if (l2_bytes, multiprocessors) == (spec.l2_bytes, spec.multiprocessors):
        return spec
    source = "as the CUDA driver reports it"
    usable = {
        "usable_l2_bytes": (
            f"{spec.sources['usable_l2_bytes']}; scaled to the L2 that the driver reports"
        )
    }
    return spec.updated(
        l2_bytes=l2_bytes,
        usable_l2_bytes=spec.usable_l2_bytes * l2_bytes // spec.l2_bytes,
        multiprocessors=multiprocessors,
        sources={**spec.sources, "l2_bytes": source, "multiprocessors": source, **usable},
    )


def _driver_attributes(ordinal: int) -> tuple[int, int] | None:
    """(bytes of L2, multiprocessors) of a GPU; None without a CUDA driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device = ctypes.c_int()
    l2_bytes = ctypes.c_int()
    multiprocessors = ctypes.c_int()
    failures = (
        driver.cuInit(0),
        driver.cuDeviceGet(ctypes.byref(device), ordinal),
        driver.cuDeviceGetAttribute(ctypes.byref(l2_bytes), L2_CACHE_SIZE, device),
        driver.cuDeviceGetAttribute(ctypes.byref(multiprocessors), MULTIPROCESSOR_COUNT, device),
    )
    return None if any(failures) else (l2_bytes.value, multiprocessors.value)
