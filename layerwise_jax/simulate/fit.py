"""A calibration from measurements: least squares on logarithms, so that being twice too fast or too
slow is as bad.
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

# What is fitted. Only the product of kernels_per_layer and kernel_seconds can be measured, so one
# of them is held.
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

# Moving a constant by a factor of e counts as much as a prediction that is off by 10 %. It decides
# where measurements say nothing (of all-reduces, if nothing ran on several devices), or something
# of several constants together only.
PRIOR = 0.1
STEP = 1e-4
MOST_ITERATIONS = 100
LARGEST_STEP = 1.0
SETTLED = 1e-6
SMALLEST = 1e-12


def fit_calibration(
    records: Iterable[Mapping[str, Any]], device: DeviceSpec, start: Calibration = STOCK
) -> Calibration:
    """The calibration under which predictions come nearest to what was measured.

    Args:
      records: measurements, as `simulate_records` reads them; other kinds are left out.
      device: what they were measured on.
      start: where to begin, and what to keep to where the measurements say nothing.

    Raises:
      ValueError: there is no measurement among the records.
    """
    found = measurements(records)
    if not found:
        raise ValueError(
            "No record has a step's seconds (kinds 'decode' and 'stage'); there is nothing to fit."
        )
    if start.permute_seconds is None:
        start = replace(start, permute_seconds=device.link_latency)
    origin = np.log([max(getattr(start, name), SMALLEST) for name in FITTED])
    point, damping = origin, 1e-3
    residuals = _residuals(point, origin, found, device, start)
    for _ in range(MOST_ITERATIONS):
        slope = _slope(point, residuals, origin, found, device, start)
        step = _damped_step(slope, residuals, damping)
        tried = _within_bounds(point + step)
        new = _residuals(tried, origin, found, device, start)
        if new @ new < residuals @ residuals:
            point, residuals, damping = tried, new, damping / 3
            if np.abs(step).max() < SETTLED:
                break
        else:
            damping *= 4
    return _calibration(
        point, start, f"fitted to {len(found)} measurements on {device.name}, from: {start.source}"
    )


def _damped_step(slope: Floats, residuals: Floats, damping: float) -> Floats:
    """Levenberg and Marquardt's step, at most a factor of e in any constant."""
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
    calibration = _calibration(point, start, start.source)
    errors = [
        np.log(predict(each.work, each.strategy, device, calibration).step_seconds / each.seconds)
        for each in found
    ]
    return np.array([*errors, *(PRIOR * (point - origin))])


def _slope(point: Floats, residuals: Floats, *rest: Any) -> Floats:
    """The residuals' derivatives, a column for each constant; shares step down, since 1 is their
    end.
    """
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
