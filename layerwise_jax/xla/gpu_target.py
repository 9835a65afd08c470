"""Target description of an absent GPU for XLA's compiler."""

from __future__ import annotations

from dataclasses import dataclass

from layerwise_jax.cost.device import DeviceSpec


@dataclass(frozen=True)
class Architecture:
    """Figures of a compute capability that a `DeviceSpec` does not have.

    Attributes:
      shared_memory: bytes of shared memory per multiprocessor.
      block_shared_memory: most bytes of shared memory per block.
      threads: threads per multiprocessor.
      float32_units: float32 operations that a multiprocessor starts per cycle.
      pallas_kind: device kind from which Pallas reads the architecture.
    """

    shared_memory: int
    block_shared_memory: int
    threads: int
    float32_units: int
    pallas_kind: str


# CUDA C++ Programming Guide, "Technical specifications per compute capability" and "Arithmetic
# instructions".
ARCHITECTURES = {
    "8.0": Architecture(167936, 166912, 2048, 64, "NVIDIA A100"),
    "8.9": Architecture(102400, 101376, 1536, 128, "NVIDIA L4"),
    "9.0": Architecture(233472, 232448, 2048, 128, "NVIDIA H100"),
    "10.0": Architecture(233472, 232448, 2048, 128, "NVIDIA B200"),
    "12.0": Architecture(102400, 101376, 1536, 128, "NVIDIA RTX PRO 6000"),
}

# The same on every architecture above, from the same tables.
THREADS_PER_WARP = 32
THREADS_PER_BLOCK = 1024
REGISTERS = 65536
BLOCK_SHARED_MEMORY_BY_DEFAULT = 49152
LARGEST_GRID = (2**31 - 1, 65535, 65535)

# Which convolutions become cuDNN calls depends on its version; this is the oldest that JAX 0.12
# installs with CUDA 13.
CUDNN_VERSION = (9, 12)


def architecture_of(device: DeviceSpec) -> Architecture:
    """Architecture of a device.

    Raises:
      ValueError: the device is not a GPU, or its architecture is not in the table.
    """
    capability = device.compute_capability
    if capability is None or capability not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(
            f"device must be a GPU of compute capability {known}, got {device.name} of "
            f"{capability}. Choose another device, or size layers on the local backend."
        )
    return ARCHITECTURES[capability]


def target_config(device: DeviceSpec) -> str:
    """A GpuTargetConfigProto of the device in protobuf's text format.

    Raises:
      ValueError: as `architecture_of`.
    """
    architecture = architecture_of(device)
    major, minor = str(device.compute_capability).split(".")
    return f"""
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          threads_per_block_limit: {THREADS_PER_BLOCK}
          threads_per_warp: {THREADS_PER_WARP}
          threads_per_core_limit: {architecture.threads}
          shared_memory_per_block: {BLOCK_SHARED_MEMORY_BY_DEFAULT}
          shared_memory_per_block_optin: {architecture.block_shared_memory}
          shared_memory_per_core: {architecture.shared_memory}
          registers_per_core_limit: {REGISTERS}
          registers_per_block_limit: {REGISTERS}
          core_count: {device.multiprocessors}
          fpus_per_core: {architecture.float32_units}
          block_dim_limit_x: {LARGEST_GRID[0]}
          block_dim_limit_y: {LARGEST_GRID[1]}
          block_dim_limit_z: {LARGEST_GRID[2]}
          memory_bandwidth: {int(device.memory_bandwidth)}
          l2_cache_size: {device.l2_bytes}
          clock_rate_ghz: {device.clock_hz / 1e9}
          device_memory_size: {device.memory_bytes}
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: {CUDNN_VERSION[0]} minor: {CUDNN_VERSION[1]} }}
        device_description_str: "{device.name}"
    """
