"""Residual policy `remat="cheap"`: keep what is expensive to compute again, recompute the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from layerwise_jax.trace.primitives import CUSTOM_RULES, EXPENSIVE

# Products, convolutions, attention, linear algebra, sorts, loops, kernels. A custom derivative rule
# (gelu, softmax) says nothing about the cost: the policy is asked for the ops inside of it.
KEPT = EXPENSIVE - CUSTOM_RULES


def recomputing_cheap(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, whose VJP keeps only results of expensive ops, and its arguments.

    `jax.checkpoint` policies inside of `run` hold on: they keep no more than they would alone.
    """
    # prevent_cse: forward and backward are in different ticks, so there is nothing to merge
    return jax.checkpoint(run, policy=is_expensive, prevent_cse=False)


def is_expensive(primitive: Any, *_: Any, **params: Any) -> bool:
    """A policy of `jax.checkpoint`: True for results that are kept."""
    del params
    # attention of a library: wrapped under names that differ between JAX versions
    return primitive.name in KEPT or "dot_product_attention" in primitive.name
