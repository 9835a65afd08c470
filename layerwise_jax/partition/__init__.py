"""Partitioning: exact cut points under a memory capacity, with certificates. Imports no JAX."""

from layerwise_jax.partition.options import SolveOptions
from layerwise_jax.partition.result import CapacityError, Partition
from layerwise_jax.partition.solver import LayerOptions, partition_layers, solve, solve_measured

__all__ = [
    "partition_layers",
    "solve",
    "solve_measured",
    "LayerOptions",
    "SolveOptions",
    "CapacityError",
    "Partition",
]
