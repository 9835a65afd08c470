"""DRAM counters: bytes that a GPU reads, to tell if a stage's working set stays in the cache.

JAX's profiler samples them (CUPTI's PM sampling) while programs run as they always do: no kernel
runs by itself or twice, and clocks and caches are left alone.
"""

import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

METRIC = "dram__bytes_read.sum"
# As often as XLA itself samples, which keeps room for 500 samples and fetches them every 0.1 s.
SAMPLE_MICROSECONDS = 500
SETTLE_SECONDS = 0.3


def dram_bytes_read(device: Any, act: Callable[[], object]) -> float:
    """Bytes that the GPU reads from DRAM while `act` runs; `act` returns after its programs have
    ended.

    Raises:
      ValueError: the device is no GPU.
      RuntimeError: there were no samples.
    """
    if device.platform != "gpu":
        raise ValueError(
            f"device must be a GPU, which counts its DRAM reads, got {device}. Leave the part "
            "'counters' out."
        )
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level = options.python_tracer_level = 0
    options.raise_error_on_start_failure = True
    options.advanced_configuration = {
        "gpu_pm_sample_counters": METRIC,
        "gpu_pm_sample_interval_us": SAMPLE_MICROSECONDS,
    }
    with tempfile.TemporaryDirectory(prefix="counters-") as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            act()
            time.sleep(SETTLE_SECONDS)
        profiles = [
            ProfileData.from_file(str(path)) for path in Path(folder).glob("**/*.xplane.pb")
        ]
    found = [size for profile in profiles for size in samples(profile, device.local_hardware_id)]
    if not found:
        raise RuntimeError(
            f"The profiler has no sample of {METRIC} on {device}. The driver may keep counters to "
            "administrators "
            "(NVreg_RestrictProfilingToAdminUsers), or CUPTI be older than CUDA 12.6."
        )
    return math.fsum(found)


def samples(profile: Any, gpu: int) -> list[float]:
    """Samples of `METRIC` in a `ProfileData` for one GPU of this host; lost samples (NaN) are
    dropped.
    """
    plane = profile.find_plane_with_name(f"/device:GPU:{gpu}")
    events = (
        [event for line in plane.lines for event in line.events if event.name == METRIC]
        if plane
        else []
    )
    values = [float(dict(event.stats)[METRIC]) for event in events]
    return [value for value in values if not math.isnan(value)]
