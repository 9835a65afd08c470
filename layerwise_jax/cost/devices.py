"""Known devices: their figures with a source for each.

Rates and bandwidths are the makers' (dense, without sparsity) unless a source says measured. The
usable cache is a measured knee where one is published. `python -m experiments.calibrate` measures
both on a local device.
"""

from __future__ import annotations

from layerwise_jax.cost.device import DeviceSpec
from layerwise_jax.cost.rates import (
    A100_KNEE,
    A100_RATES,
    ADA_KNEE_SOURCE,
    ADA_SHARE,
    GIB,
    H100_KNEE,
    H200_KNEE,
    HOPPER_SXM_RATES,
    MIB,
    PCIE_SOURCE,
    PERMUTE_SECONDS,
    TARGET_SOURCE,
    UNMEASURED_SHARE,
    gpu,
    sources_of,
    tera,
)

__all__ = [
    "A100",
    "A100_40",
    "B200",
    "CPU",
    "DEVICES",
    "H100",
    "H100_PCIE",
    "H200",
    "L4",
    "L40S",
    "RTX_4090",
    "RTX_5090",
    "DeviceSpec",
    "device_named",
]
A100_40 = gpu(
    name="NVIDIA A100-SXM4-40GB",
    l2_bytes=40 * MIB,
    usable_l2_bytes=A100_KNEE,
    memory_bytes=40 * GIB,
    memory_bandwidth=1.555e12,
    l2_bandwidth=4.5e12,
    flops_per_second=A100_RATES,
    link_bandwidth=300e9,
    link_latency=PERMUTE_SECONDS,
    compute_capability="8.0",
    multiprocessors=108,
    clock_hz=1.41e9,
    sources=sources_of(
        "NVIDIA A100 data sheet",
        usable_l2_bytes="published knee (gpu-benches, gpu-l2-cache)",
        l2_bandwidth="2.9 times the memory's, published (gpu-benches, gpu-l2-cache)",
    ),
)
A100 = gpu(
    name="NVIDIA A100-SXM4-80GB",
    l2_bytes=40 * MIB,
    usable_l2_bytes=A100_KNEE,
    memory_bytes=80 * GIB,
    memory_bandwidth=2.039e12,
    l2_bandwidth=4.5e12,
    flops_per_second=A100_RATES,
    link_bandwidth=300e9,
    link_latency=PERMUTE_SECONDS,
    compute_capability="8.0",
    multiprocessors=108,
    clock_hz=1.41e9,
    sources=sources_of(
        "NVIDIA A100 data sheet",
        usable_l2_bytes="published knee (gpu-benches, gpu-l2-cache)",
        l2_bandwidth="as the A100 of 40 GB, whose processor it shares",
    ),
)
H100_PCIE = gpu(
    name="NVIDIA H100 PCIe",
    l2_bytes=50 * MIB,
    usable_l2_bytes=H100_KNEE,
    memory_bytes=80 * GIB,
    memory_bandwidth=2.039e12,
    l2_bandwidth=7.1e12,
    flops_per_second=tera(
        float64=51, float32=51, tensorfloat32=378, half=756.5, float8=1513, int8=1513
    ),
    link_bandwidth=64e9,
    link_latency=PERMUTE_SECONDS,
    compute_capability="9.0",
    multiprocessors=114,
    clock_hz=1.755e9,
    sources=sources_of(
        "NVIDIA H100 data sheet",
        usable_l2_bytes="published knee (gpu-benches, gpu-l2-cache)",
        l2_bandwidth="3.5 times the memory's, published (gpu-benches, gpu-l2-cache)",
        link_bandwidth=PCIE_SOURCE,
        clock_hz=TARGET_SOURCE,
    ),
)
H100 = gpu(
    name="NVIDIA H100 80GB HBM3",
    l2_bytes=50 * MIB,
    usable_l2_bytes=H100_KNEE,
    memory_bytes=80 * GIB,
    memory_bandwidth=3.35e12,
    l2_bandwidth=8.4e12,
    flops_per_second=HOPPER_SXM_RATES,
    link_bandwidth=450e9,
    link_latency=PERMUTE_SECONDS,
    compute_capability="9.0",
    multiprocessors=132,
    clock_hz=1.98e9,
    sources=sources_of(
        "NVIDIA H100 data sheet",
        usable_l2_bytes=(
            "published knee of the H100 PCIe (gpu-benches, gpu-l2-cache), which has the same cache"
        ),
        l2_bandwidth="as measured on an H200, which has the same multiprocessors at the same clock",
        clock_hz=TARGET_SOURCE,
    ),
)
H200 = gpu(
    name="NVIDIA H200",
    l2_bytes=60 * MIB,
    usable_l2_bytes=H200_KNEE,
    memory_bytes=151397597184,
    memory_bandwidth=4.8e12,
    l2_bandwidth=8.4e12,
    flops_per_second=HOPPER_SXM_RATES,
    link_bandwidth=450e9,
    link_latency=PERMUTE_SECONDS,
    compute_capability="9.0",
    multiprocessors=132,
    clock_hz=1.98e9,
    sources=sources_of(
        "NVIDIA H200 data sheet",
        l2_bytes=(
            "cudaDeviceProp.l2CacheSize of an H200, driver 580 (OpenXLA's target description "
            "says 50 MiB)"
        ),
        usable_l2_bytes=(
            "measured: flat reads by one persistent kernel, 8.0 to 8.6e12 B/s up to 48 MiB, "
            "6.6e12 at 56"
        ),
        memory_bytes=TARGET_SOURCE,
        l2_bandwidth="measured: flat reads by one persistent kernel, working sets of 8 to 48 MiB",
        clock_hz=TARGET_SOURCE,
    ),
)
B200 = gpu(
    name="NVIDIA B200",
    l2_bytes=132644864,
    usable_l2_bytes=int(132644864 * UNMEASURED_SHARE),
    memory_bytes=191514411008,
    memory_bandwidth=7.7e12,
    l2_bandwidth=14e12,
    flops_per_second=tera(
        float64=37, float32=75, tensorfloat32=1100, half=2250, float8=4500, int8=4500, float4=9000
    ),
    link_bandwidth=900e9,
    link_latency=PERMUTE_SECONDS,
    compute_capability="10.0",
    multiprocessors=148,
    clock_hz=1.965e9,
    sources=sources_of(
        "NVIDIA HGX B200 data sheet, one of eight GPUs",
        l2_bytes=TARGET_SOURCE,
        memory_bytes=TARGET_SOURCE,
        memory_bandwidth=TARGET_SOURCE,
        l2_bandwidth="not measured: the memory's times the H200's measured ratio of 8.4 to 4.6",
        multiprocessors=TARGET_SOURCE,
        clock_hz=TARGET_SOURCE,
    ),
)
L4 = gpu(
    name="NVIDIA L4",
    l2_bytes=48 * MIB,
    usable_l2_bytes=int(48 * MIB * ADA_SHARE),
    memory_bytes=24 * GIB,
    memory_bandwidth=300e9,
    l2_bandwidth=1.9e12,
    flops_per_second=tera(
        float64=0.47, float32=30.3, tensorfloat32=60, half=121, float8=242.5, int8=242.5
    ),
    link_bandwidth=32e9,
    link_latency=PERMUTE_SECONDS,
    compute_capability="8.9",
    multiprocessors=58,
    clock_hz=2.04e9,
    sources=sources_of(
        "NVIDIA L4 data sheet",
        usable_l2_bytes=ADA_KNEE_SOURCE,
        l2_bandwidth="not measured: the memory's times the L40's published ratio of 6.2",
        link_bandwidth=PCIE_SOURCE,
    ),
)
L40S = gpu(
    name="NVIDIA L40S",
    l2_bytes=96 * MIB,
    usable_l2_bytes=91 * MIB,
    memory_bytes=48 * GIB,
    memory_bandwidth=864e9,
    l2_bandwidth=5.4e12,
    flops_per_second=tera(
        float64=1.4, float32=91.6, tensorfloat32=183, half=362, float8=733, int8=733
    ),
    link_bandwidth=32e9,
    link_latency=PERMUTE_SECONDS,
    compute_capability="8.9",
    multiprocessors=142,
    clock_hz=2.52e9,
    sources=sources_of(
        "NVIDIA L40S data sheet",
        usable_l2_bytes=(
            "published knee of the L40 (gpu-benches, gpu-l2-cache), which has the same processor"
        ),
        l2_bandwidth="6.2 times the memory's, published for the L40 (gpu-benches, gpu-l2-cache)",
        link_bandwidth=PCIE_SOURCE,
    ),
)
RTX_4090 = gpu(
    name="NVIDIA GeForce RTX 4090",
    l2_bytes=72 * MIB,
    usable_l2_bytes=int(72 * MIB * ADA_SHARE),
    memory_bytes=24 * GIB,
    memory_bandwidth=1.008e12,
    l2_bandwidth=4.9e12,
    flops_per_second=tera(
        float64=1.29, float32=82.6, tensorfloat32=82.6, half=165.2, float8=330.3, int8=660.6
    ),
    link_bandwidth=32e9,
    link_latency=PERMUTE_SECONDS,
    compute_capability="8.9",
    multiprocessors=128,
    clock_hz=2.52e9,
    sources=sources_of(
        "NVIDIA Ada architecture paper, sums in float32",
        usable_l2_bytes=ADA_KNEE_SOURCE,
        l2_bandwidth="not measured: the L40S's, by multiprocessors at the same clock",
        link_bandwidth=PCIE_SOURCE,
    ),
)
RTX_5090 = gpu(
    name="NVIDIA GeForce RTX 5090",
    l2_bytes=96 * MIB,
    usable_l2_bytes=int(96 * MIB * UNMEASURED_SHARE),
    memory_bytes=32 * GIB,
    memory_bandwidth=1.792e12,
    l2_bandwidth=6.2e12,
    flops_per_second=tera(
        float64=1.64,
        float32=104.8,
        tensorfloat32=104.8,
        half=209.5,
        float8=419,
        int8=838,
        float4=1676,
    ),
    link_bandwidth=64e9,
    link_latency=PERMUTE_SECONDS,
    compute_capability="12.0",
    multiprocessors=170,
    clock_hz=2.407e9,
    sources=sources_of(
        "NVIDIA RTX Blackwell architecture paper, sums in float32",
        l2_bandwidth="not measured: the L40S's, by multiprocessors and clock",
        link_bandwidth=PCIE_SOURCE,
    ),
)
CPU = DeviceSpec.of(
    name="cpu",
    l2_bytes=32 * MIB,
    usable_l2_bytes=int(32 * MIB * UNMEASURED_SHARE),
    memory_bytes=16 * GIB,
    memory_bandwidth=50e9,
    l2_bandwidth=200e9,
    flops_per_second={"float64": 0.25e12, "float32": 0.5e12, "int8": 0.5e12},
    link_bandwidth=25e9,
    link_latency=5e-6,
    compute_capability=None,
    multiprocessors=8,
    clock_hz=3e9,
    sources=dict.fromkeys(
        sources_of(""), "placeholder for an unknown CPU, for trying plans out; nothing was measured"
    ),
)
DEVICES = (A100_40, A100, H100_PCIE, H100, H200, B200, L4, L40S, RTX_4090, RTX_5090, CPU)

# Other names of these devices, in JAX or in common use.
_ALIASES = {
    "a100": A100,
    "nvidia a100 80gb pcie": A100,
    "nvidia a100-pcie-40gb": A100_40,
    "h100": H100,
    "nvidia h100": H100,
    "h100 pcie": H100_PCIE,
    "h200": H200,
    "nvidia h200 141gb hbm3e": H200,
    "b200": B200,
    "l4": L4,
    "l40s": L40S,
    "rtx 4090": RTX_4090,
    "rtx 5090": RTX_5090,
}


def device_named(kind: str) -> DeviceSpec:
    """Looks up a device by the kind that JAX reports (`jax.devices()[0].device_kind`).

    The case of letters does not matter.

    Raises:
      ValueError: the table has no such device.
    """
    known = {spec.name.lower(): spec for spec in DEVICES} | _ALIASES
    if kind.lower() not in known:
        names = ", ".join(spec.name for spec in DEVICES)
        raise ValueError(
            f"kind must be a known device ({names}), got '{kind}'. Calibrate it (python -m "
            "experiments.calibrate writes a file for DeviceSpec.from_json), or make a DeviceSpec."
        )
    return known[kind.lower()]
