"""Batch analysis: proves whether per-microbatch results recombine to the full-batch result."""

from layerwise_jax.batch.analysis import BatchAnalysis, analyze_batching
from layerwise_jax.batch.pairs import BatchError

__all__ = ["BatchAnalysis", "analyze_batching", "BatchError"]
