"""Calibration from measurements: least squares on logarithms of step times.

On logarithms, predictions of half and of twice the measured time are equally wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layerwise_jax.cost.device import DeviceSpec
from layerwise_jax.simulate.calibration import SHARES, STOCK, Calibration
from layerwise_jax.simulate.predictor import predict
from layerwise_jax.simulate.records import Measurement, measurements

Floats = NDArray[np.float64]

# Fitted constants. Only the product of kernels_per_layer and kernel_seconds can be measured, so
# kernels_per_layer is held.
FITTED = (
    "weight_share",
    "state_share",
    "cache_share",
    "kernel_seconds",
    "row_seconds",
    "tick_seconds",
    "permute_seconds",
    "all_reduce_seconds",
)

# Weight of the prior: a constant changed by a factor of e counts as much as a prediction that is
# off by 10 %. The prior decides constants that the measurements do not determine, such as
# all_reduce_seconds if nothing ran on several devices.
PRIOR = 0.1
STEP = 1e-4
MOST_ITERATIONS = 100
LARGEST_STEP = 1.0
SETTLED = 1e-6
SMALLEST = 1e-12


def fit_calibration(
    records: Iterable[Mapping[str, Any]], device: DeviceSpec, start: Calibration = STOCK
) -> Calibration:
    """Fits the constants of a calibration to measurements.

    Args:
      records: measurements, see the module `records`; records of other kinds are ignored.
      device: device of the measurements.
      start: initial constants, kept where the measurements do not determine them.

    Raises:
      ValueError: no record is a measurement.
    """
    found = measurements(records)
    if not found:
        raise ValueError(
            "records must have at least one of the kinds 'decode' or 'stage' with "
            "seconds_per_step, got none: there is nothing to fit."
        )
    if start.permute_seconds is None:
        start = replace(start, permute_seconds=device.link_latency)
    origin = np.log([max(getattr(start, name), SMALLEST) for name in FITTED])
    point = origin  # [constants], logarithms
    damping = 1e-3
    residuals = _residuals(point, origin, found, device, start)
    for _ in range(MOST_ITERATIONS):
        slope = _slope(point, residuals, origin, found, device, start)
        step = _damped_step(slope, residuals, damping)
        tried = _within_bounds(point + step)
        new = _residuals(tried, origin, found, device, start)
        if new @ new < residuals @ residuals:
            point = tried
            residuals = new
            damping = damping / 3
            if np.abs(step).max() < SETTLED:
                break
        else:
            damping *= 4
    return _calibration(
        point, start, f"fitted to {len(found)} measurements on {device.name}, from: {start.source}"
    )


def _damped_step(slope: Floats, residuals: Floats, damping: float) -> Floats:
    """Step of the Levenberg-Marquardt method, at most a factor of e in any constant."""
    square = slope.T @ slope
    step = np.linalg.solve(square + damping * np.diag(np.diag(square)), -slope.T @ residuals)
    return np.clip(step, -LARGEST_STEP, LARGEST_STEP)


def _residuals(
    point: Floats,
    origin: Floats,
    found: Sequence[Measurement],
    device: DeviceSpec,
    start: Calibration,
) -> Floats:
    """[measurements + constants], log errors of the predictions, then those of the prior."""
    calibration = _calibration(point, start, start.source)
    errors = [
        np.log(predict(each.work, each.strategy, device, calibration).step_seconds / each.seconds)
        for each in found
    ]
    return np.array([*errors, *(PRIOR * (point - origin))])


def _slope(point: Floats, residuals: Floats, *rest: Any) -> Floats:
    """[residuals, constants], derivatives by backward differences, since shares end at 1."""
    columns = [
        (_residuals(point - STEP * unit, *rest) - residuals) / -STEP for unit in np.eye(len(point))
    ]
    return np.stack(columns, axis=1)


def _within_bounds(point: Floats) -> Floats:
    ceilings = [0.0 if name in SHARES else np.inf for name in FITTED]
    return np.clip(point, np.log(SMALLEST), ceilings)


def _calibration(point: Floats, start: Calibration, source: str) -> Calibration:
    values = dict(zip(FITTED, np.exp(point).tolist(), strict=True))
    return replace(start, **values, source=source)
