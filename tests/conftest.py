"""Shared by all tests: 16 emulated CPU devices, meshes over them, hypothesis profile, --sample."""

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

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


@pytest.fixture
def float64() -> Iterator[None]:
    """float64 for comparisons over several training steps.

    Optimizers that divide by a gradient's own size turn one rounding into a step of full size, so
    no tolerance of float32 holds on every processor.
    """
    with jax.enable_x64(True):
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--sample", type=int, default=1, metavar="N", help="run only every Nth test of each file"
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps every Nth test of each file, from its first, after `-m` and `-k` have selected."""
    step = int(config.getoption("--sample") or 1)
    seen: Counter[Path] = Counter()
    kept, dropped = [], []
    for item in items:
        (dropped if seen[item.path] % step else kept).append(item)
        seen[item.path] += 1
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept
