"""Rates, cache knees, shared memory and sources, for the table of known devices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerwise_jax.cost.device import DeviceSpec

KIB = 2**10
MIB = 2**20
GIB = 2**30

# Knees: the largest working set that is still read at the cache's bandwidth, in bytes or as a share
# of the cache. Published ones are from RRZE's gpu-benches (gpu-l2-cache).
A100_KNEE = 25 * MIB
H100_KNEE = 37 * MIB
H200_KNEE = 48 * MIB
ADA_SHARE = 91 / 96

# Share for architectures without a published knee: the smallest one measured elsewhere, the A100's
# 25 of 40 MiB.
UNMEASURED_SHARE = 25 / 40
ADA_KNEE_SOURCE = (
    "91 of 96 MiB, the knee published for the L40 (gpu-benches), taken as a share of this cache"
)
UNMEASURED_KNEE_SOURCE = (
    "not measured: 25/40 of the cache, the smallest share measured on another GPU (A100)"
)

# A compiled loop takes 18 to 25 us an iteration with jax.lax.ppermute and 9 us without (H200, JAX
# 0.11.2).
PERMUTE_SECONDS = 12e-6
NVLINK_SOURCE = "NVIDIA data sheet: NVLink, half of the bidirectional figure"
PCIE_SOURCE = "PCI Express 16 lanes, one direction, by the standard"
TARGET_SOURCE = "OpenXLA's target description of this device"


# Shared memory of a multiprocessor, and the most that one block may use, in KiB, by compute
# capability.
SHARED_KIB = {
    "8.0": (164, 163),
    "8.9": (100, 99),
    "9.0": (228, 227),
    "10.0": (228, 227),
    "12.0": (100, 99),
}
SHARED_BYTES_PER_CLOCK = 128
CUDA_GUIDE = "CUDA C++ programming guide, by compute capability"


def gpu(**figures: Any) -> DeviceSpec:
    """A spec from flat figures, with shared memory by compute capability and multiprocessors."""
    whole, usable = SHARED_KIB[figures["compute_capability"]]
    multiprocessors = figures["multiprocessors"]
    return DeviceSpec.of(
        shared_bytes=multiprocessors * whole * KIB,
        usable_shared_bytes=multiprocessors * usable * KIB,
        shared_bandwidth=multiprocessors * SHARED_BYTES_PER_CLOCK * figures["clock_hz"],
        **figures,
    )


def sources_of(data_sheet: str, **particular: str) -> Mapping[str, str]:
    """Field -> source: the data sheet and usual sources, overridden by `particular`."""
    usual = {
        "l2_bytes": f"{data_sheet}; cudaDeviceProp.l2CacheSize",
        "usable_l2_bytes": UNMEASURED_KNEE_SOURCE,
        "shared_bytes": CUDA_GUIDE,
        "usable_shared_bytes": CUDA_GUIDE,
        "shared_bandwidth": "128 bytes a clock and multiprocessor, not measured",
        "memory_bytes": data_sheet,
        "memory_bandwidth": data_sheet,
        "l2_bandwidth": "not measured",
        "flops_per_second": (
            f"{data_sheet}: tensor cores, dense (half of the figures with sparsity)"
        ),
        "link_bandwidth": NVLINK_SOURCE,
        "link_latency": (
            "measured on an H200 (ppermute in a compiled loop, JAX 0.11.2), taken for all"
        ),
        "compute_capability": "NVIDIA's list of CUDA GPUs",
        "multiprocessors": data_sheet,
        "clock_hz": f"{data_sheet}: boost clock",
    }
    return {**usual, **particular}


def tera(half: float, **others: float) -> Mapping[str, float]:
    """Dtype -> operations a second, from figures in 10^12; `half` is float16's and bfloat16's."""
    return {
        name: rate * 1e12 for name, rate in {**others, "bfloat16": half, "float16": half}.items()
    }


A100_RATES = tera(float64=19.5, float32=19.5, tensorfloat32=156, half=312, int8=624)
HOPPER_SXM_RATES = tera(
    float64=67, float32=67, tensorfloat32=494.7, half=989.4, float8=1978.9, int8=1978.9
)
