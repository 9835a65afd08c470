"""Predictions of step time and memory under every strategy. Imports no JAX."""

from layerwise_jax.simulate.calibration import STOCK, Calibration
from layerwise_jax.simulate.comparison import Comparison, compare_dense, compare_work
from layerwise_jax.simulate.fit import fit_calibration
from layerwise_jax.simulate.prediction import Prediction
from layerwise_jax.simulate.predictor import best_strategies, ideal_per_second, predict
from layerwise_jax.simulate.records import (
    Measurement,
    measurements,
    predict_record,
    strategy_of_record,
    work_of,
)
from layerwise_jax.simulate.stage import ring_all_reduce_bytes
from layerwise_jax.simulate.strategy import Strategy, strategy_of
from layerwise_jax.simulate.work import (
    ALL_REDUCES_PER_LAYER,
    LayerWork,
    StepWork,
    dense_decode,
    dense_prefill,
)

__all__ = [
    "best_strategies",
    "ideal_per_second",
    "predict",
    "ALL_REDUCES_PER_LAYER",
    "LayerWork",
    "StepWork",
    "dense_decode",
    "dense_prefill",
    "Strategy",
    "strategy_of",
    "Prediction",
    "STOCK",
    "Calibration",
    "Measurement",
    "measurements",
    "predict_record",
    "strategy_of_record",
    "work_of",
    "fit_calibration",
    "ring_all_reduce_bytes",
    "Comparison",
    "compare_dense",
    "compare_work",
]
