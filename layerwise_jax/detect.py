"""The device at hand, as JAX and its driver report it."""

from __future__ import annotations

import jax

from layerwise_jax.device_spec import DeviceSpec
from layerwise_jax.devices import CPU, device_named


def detect_device() -> DeviceSpec:
    """The spec of JAX's first local device.

    Raises:
      ValueError: it is neither a CPU nor a GPU of the table in `layerwise_jax.devices`.
    """
    device = jax.local_devices()[0]
    return CPU if device.platform == "cpu" else device_named(device.device_kind)
