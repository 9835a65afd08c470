"""What all tests share: 16 emulated CPU devices, meshes over them, and how hypothesis draws."""

import math
import os
from collections.abc import Callable

import hypothesis
import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

# enough for 8 stages in 2 ways of data parallelism; each costs four idle threads and no time
NUM_DEVICES = 16

# Before the first use of a device, and in the process of every xdist worker: an accelerator that is
# there stays unused.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", NUM_DEVICES)

# An example takes as long as its compilation. In continuous integration every run draws the same
# examples.
hypothesis.settings.register_profile(
    "layerwise",
    deadline=None,
    derandomize="CI" in os.environ,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("layerwise")


@pytest.fixture(scope="session")
def stage_mesh() -> Callable[..., Mesh]:
    """A maker of meshes: `stage_mesh(4)` has an axis `stage` of 4 devices, `stage_mesh(4, data=2)`
    also one `data`.
    """

    def make(num_stages: int, **ways: int) -> Mesh:
        axes = {"stage": num_stages, **ways}
        devices = np.array(jax.devices()[: math.prod(axes.values())]).reshape(*axes.values())
        return Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))

    return make
