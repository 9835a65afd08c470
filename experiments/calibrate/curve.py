"""Figures of a `DeviceSpec` from a curve of read bandwidth over working sets."""

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from experiments.calibrate.reads import Reading
from layerwise_jax.cost import DeviceSpec

# A working set counts as resident while it is read at nine tenths of the cache's bandwidth.
RESIDENT_SHARE = 0.9
# Half of the cache is resident on every GPU that was measured; four times the cache is on none.
SURELY_RESIDENT = 0.5
SURELY_STREAMED = 4


class Calibration(NamedTuple):
    """Calibrated figures: largest resident working set in bytes, both bandwidths in bytes per
    second.
    """

    knee: int
    l2_bandwidth: float
    memory_bandwidth: float


def calibration_of(readings: Sequence[Reading], l2_bytes: int) -> Calibration:
    """Derives knee and bandwidths from a curve.

    The cache's bandwidth is the median over working sets within half of it, the memory's the median
    over those beyond four times it. The knee is the last working set before the first one that is
    read markedly slower than the cache.

    Args:
      readings: the curve, by growing working set.
      l2_bytes: the cache's nominal size.

    Raises:
      ValueError: the curve has no point within half of the cache, or none beyond four times it.
    """
    resident = [
        reading.bandwidth
        for reading in readings
        if reading.working_set <= SURELY_RESIDENT * l2_bytes
    ]
    streamed = [
        reading.bandwidth
        for reading in readings
        if reading.working_set >= SURELY_STREAMED * l2_bytes
    ]
    if not resident or not streamed:
        sizes = [reading.working_set for reading in readings]
        raise ValueError(
            f"The curve covers working sets of {min(sizes)} to {max(sizes)} bytes; for a cache of "
            f"{l2_bytes} bytes it "
            f"must begin within half of that and go beyond {SURELY_STREAMED} times it."
        )
    cache = median(resident)
    knee = readings[0].working_set
    for reading in readings:
        if reading.bandwidth < RESIDENT_SHARE * cache:
            break
        knee = reading.working_set
    return Calibration(knee, cache, median(streamed))


def calibrated(spec: DeviceSpec, found: Calibration, how: str) -> DeviceSpec:
    """The spec with the measured figures in place of the known ones.

    Args:
      spec: the device's spec from the table.
      found: what was measured.
      how: when and with what, for the spec's sources.
    """
    measured = {
        "usable_l2_bytes": min(found.knee, spec.l2_bytes),
        "l2_bandwidth": found.l2_bandwidth,
        "memory_bandwidth": found.memory_bandwidth,
    }
    sources = {**spec.sources, **dict.fromkeys(measured, how)}
    return spec.updated(**measured, sources=sources)
