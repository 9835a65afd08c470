"""Mesh axes of a pipeline: their names, a default mesh, and checks of a given one."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

STAGE = "stage"
DATA = "data"


def check_mesh(mesh: Mesh, num_devices: int | None) -> int:
    """The number of replicas on a mesh of which each has `num_devices` (None: any number).

    Raises:
      ValueError: no axis `stage`, or one of another size.
    """
    if STAGE not in mesh.axis_names:
        raise ValueError(
            f"The mesh has the axes {mesh.axis_names}; layer-wise placement needs one named "
            "'stage'. "
            "Make it with jax.make_mesh((num_stages,), ('stage',), "
            "axis_types=(jax.sharding.AxisType.Auto,))."
        )
    if num_devices is not None and mesh.shape[STAGE] != num_devices:
        raise ValueError(
            f"{num_devices} stages in a row need as many devices; the mesh's axis 'stage' has "
            f"{mesh.shape[STAGE]} "
            "devices. Give a mesh of that size, ask for another number of stages, or for an "
            "interleaved schedule, in "
            "which stages share devices."
        )
    return mesh.shape.get(DATA, 1)


def stage_mesh(num_devices: int) -> Mesh:
    """A mesh of the first local devices, all on the axis `stage`.

    Raises:
      ValueError: there are fewer devices.
    """
    devices = jax.local_devices()
    if len(devices) < num_devices:
        raise ValueError(
            f"{num_devices} stages need {num_devices} devices; there are {len(devices)}. Ask for "
            "fewer stages, or "
            "emulate devices on the CPU: jax.config.update('jax_num_cpu_devices', n) before "
            "anything else."
        )
    return Mesh(np.array(devices[:num_devices]), (STAGE,), axis_types=(AxisType.Auto,))
