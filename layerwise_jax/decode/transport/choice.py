"""Choice of a transport: by name, or by what the mesh's devices can do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from jax.sharding import Mesh

from layerwise_jax import processes
from layerwise_jax.decode.transport.interface import Permute, Transport
from layerwise_jax.decode.transport.peer_store import PeerStore
from layerwise_jax.mesh import STAGE
from layerwise_jax.xla.cuda_driver import CudaDriver, CudaDriverError

# Mosaic's kernels begin with an instruction that came with this architecture.
LEAST_COMPUTE_CAPABILITY = 9.0

NAMES = ("auto", "peer_store", "permute")


def choose_transport(
    transport: str | Transport, mesh: Mesh, load: Callable[[], CudaDriver] = CudaDriver.load
) -> Transport:
    """The transport of a ring over a mesh.

    Args:
      transport: "permute"; "peer_store"; "auto" for peer stores where all devices are CUDA devices
        of this process whose memory the senders reach, otherwise permute; or a transport.
      mesh: the mesh. Absent devices, which a program is only compiled for, cannot be asked what
        they reach: "auto" permutes there, and "peer_store" is taken as given.
      load: gives the CUDA driver.

    Raises:
      ValueError: another value, or the devices cannot pass messages so.
    """
    if isinstance(transport, str):
        if transport not in NAMES:
            raise ValueError(f"transport must be one of {NAMES} or a Transport, got {transport!r}.")
        chosen = Permute() if transport == "permute" else PeerStore()
    elif hasattr(transport, "exchange"):
        chosen = transport
    else:
        raise ValueError(f"transport must be one of {NAMES} or a Transport, got {transport!r}.")
    if type(chosen) is not PeerStore:
        return chosen
    if mesh.shape[STAGE] == 1:
        return Permute()  # a ring of one stage sends to itself, which XLA leaves out
    obstacle = _obstacle(mesh, load, is_asked=transport != "auto")
    if obstacle is None:
        return chosen
    if transport == "auto":
        return Permute()
    raise ValueError(
        f"transport must be 'permute' or 'auto' where {obstacle}, got {transport!r}. Peer stores "
        "need CUDA devices of one process that reach each other's memory."
    )


def _obstacle(mesh: Mesh, load: Callable[[], CudaDriver], is_asked: bool) -> str | None:
    """The reason why a mesh's devices cannot store into each other's memory; None if they can."""
    devices = list(mesh.devices.flat)
    # Absent devices are of the platform "gpu" too.
    kinds = sorted({device.platform for device in devices})
    if kinds not in (["gpu"], ["cuda"]):
        return f"the mesh has devices of the platform {' and '.join(kinds)}"
    if processes.are_of_several(devices):
        return "the mesh spans several processes"
    capabilities = [_compute_capability(device) for device in devices]
    if None in capabilities:
        return "the devices are no CUDA devices"
    least = min(x for x in capabilities if x is not None)
    if least < LEAST_COMPUTE_CAPABILITY:
        return f"a device has compute capability {least}, less than {LEAST_COMPUTE_CAPABILITY}"
    if not processes.are_local(devices):
        return None if is_asked else "the devices are absent"
    return _unreachable(mesh, load)


def _unreachable(mesh: Mesh, load: Callable[[], CudaDriver]) -> str | None:
    """The first sender that does not reach its receiver's memory, in words."""
    axis = mesh.axis_names.index(STAGE)
    receivers = np.roll(mesh.devices, -1, axis=axis)
    try:
        driver = load()
        for own, peer in zip(mesh.devices.flat, receivers.flat, strict=True):
            if not driver.can_access_peer(own.local_hardware_id, peer.local_hardware_id):
                return f"{own} does not reach the memory of {peer}"
    except CudaDriverError as error:
        return f"the CUDA driver answers: {error}"
    return None


def _compute_capability(device: Any) -> float | None:
    try:
        return float(device.compute_capability)
    except (AttributeError, TypeError, ValueError):
        return None  # an AMD device names its architecture here, or has no such attribute
