"""Mesh axes of a pipeline: their names, a default mesh, checks of a given one; emulated devices."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from layerwise_jax import processes

STAGE = "stage"
DATA = "data"


def check_mesh(mesh: Mesh, num_devices: int | None) -> int:
    """Checks the axis `stage` of a mesh and returns the size of its axis `data`, 1 without one.

    Args:
      mesh: the mesh of a pipeline.
      num_devices: required size of the axis `stage`; None for any.

    Raises:
      ValueError: no axis `stage`, or one of another size.
    """
    if STAGE not in mesh.axis_names:
        raise ValueError(
            f"mesh must have an axis 'stage', got the axes {mesh.axis_names}. Make it with "
            "jax.make_mesh((num_stages,), ('stage',), "
            "axis_types=(jax.sharding.AxisType.Auto,))."
        )
    if num_devices is not None and mesh.shape[STAGE] != num_devices:
        raise ValueError(
            f"mesh must have {num_devices} devices on its axis 'stage', one for each stage, got "
            f"{mesh.shape[STAGE]}. Give a mesh of that size, another num_stages, or a schedule "
            "that places several stages on a device, such as 'interleaved_1f1b'."
        )
    return mesh.shape.get(DATA, 1)


def stage_mesh(num_devices: int) -> Mesh:
    """A mesh of the first `num_devices` devices of all processes on one axis, `stage`.

    Devices of a process are neighbours, so that only every last stage of a process sends to
    another process.

    Raises:
      ValueError: there are fewer devices.
    """
    devices = processes.devices()
    if len(devices) < num_devices:
        raise ValueError(
            f"num_devices must be at most {len(devices)}, the number of devices, got "
            f"{num_devices}. Ask for fewer stages, or emulate devices on the CPU: "
            f"layerwise_jax.emulate_devices({num_devices}) before any other use of JAX."
        )
    return Mesh(np.array(devices[:num_devices]), (STAGE,), axis_types=(AxisType.Auto,))


def emulate_devices(count: int) -> None:
    """Makes JAX use `count` emulated CPU devices. Call it before any array or device is made.

    Raises:
      RuntimeError: JAX has started with another number of devices.
    """
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        raise RuntimeError(
            f"emulate_devices({count}) must run before JAX starts its backend, and it has started "
            "with another number of devices. Call it before the first array or device is made."
        ) from error
