"""Training: optax on placed parameters, and the training step."""

from layerwise_jax.train.optimizer import StagedOptimizer
from layerwise_jax.train.step import TrainStep

__all__ = ["StagedOptimizer", "TrainStep"]
