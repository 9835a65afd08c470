"""Measurements: layer costs from compiled programs, the local device, the microbatch size."""

from layerwise_jax.measure.detect import detect_device
from layerwise_jax.measure.layers import CompiledCosts, measure_costs
from layerwise_jax.measure.microbatch import StagingChoices, choose_staging, roofline_seconds

__all__ = [
    "CompiledCosts",
    "measure_costs",
    "StagingChoices",
    "choose_staging",
    "roofline_seconds",
    "detect_device",
]
