"""Bytes that cross between processes: activations at boundaries, gradients of replicas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from layerwise_jax._tables import bytes_text


@dataclass(frozen=True)
class HostTraffic:
    """Bytes that all replicas together send from process to process in a step.

    Attributes:
      activations: live values of all microbatches, forwards; as many gradients of them come back.
      gradients: gradients of weights, all-reduced around a ring of the replicas: each of n devices
        sends 2 (n - 1) / n of the bytes to the next (Patarasuk and Yuan, 2009).
    """

    activations: int
    gradients: int

    def __str__(self) -> str:
        return (
            f"between processes cross {bytes_text(self.activations)} of activations a forward "
            f"pass, as much again backward, and {bytes_text(self.gradients)} of gradients a "
            "training step."
        )


def host_traffic(
    owners: np.ndarray,
    devices_of_stages: Sequence[int],
    send_bytes: Sequence[int],
    weight_bytes: Sequence[int],
    num_microbatches: int,
) -> HostTraffic:
    """Traffic between processes.

    Args:
      owners: int[replicas, devices], the process of every device.
      devices_of_stages: for every stage, its device in a replica.
      send_bytes: for every stage, bytes that a microbatch sends to the next stage.
      weight_bytes: for every stage, bytes of its weights' gradients.
      num_microbatches: microbatches of a replica.
    """
    replicas = owners.shape[0]
    activations = 0
    gradients = 0.0
    for stage, device in enumerate(devices_of_stages):
        if stage + 1 < len(devices_of_stages):
            crossing = owners[:, device] != owners[:, devices_of_stages[stage + 1]]  # [replicas]
            activations += int(crossing.sum()) * send_bytes[stage] * num_microbatches
        ring = owners[:, device] != np.roll(owners[:, device], -1)
        gradients += int(ring.sum()) * 2 * (replicas - 1) / replicas * weight_bytes[stage]
    return HostTraffic(activations, round(gradients))
