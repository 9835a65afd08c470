"""Tolerances derived from a program's own change under other orders of summation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

NUM_ORDERS = 3


def largest_difference(got: Any, expected: Any) -> float:
    """Largest difference of two trees, relative to the largest entry of each leaf."""
    worst = 0.0
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(x), np.asarray(y)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if not jnp.issubdtype(a.dtype, jnp.inexact):
            np.testing.assert_array_equal(a, b)
            continue
        wide = np.complex128 if jnp.issubdtype(a.dtype, jnp.complexfloating) else np.float64
        a, b = a.astype(wide), b.astype(wide)
        if a.size:
            scale = max(np.abs(b).max(), np.finfo(np.float32).tiny)
            worst = max(worst, float(np.abs(a - b).max() / scale))
    return worst


def change_by_order(
    run: Callable[[np.ndarray], Any], expected: Any, num_examples: int, dtype: Any
) -> float:
    """Largest relative change of a run when its examples are summed in another order.

    At least one rounding of `dtype`, since a small program may add up equally in all orders tried.

    Args:
      run: results by order of the examples, put back into the first order.
      expected: results in the first order.
      num_examples: number of examples.
      dtype: dtype of the run.
    """
    rng = np.random.default_rng(0)
    orders = [np.arange(num_examples)[::-1]]
    orders += [rng.permutation(num_examples) for _ in range(NUM_ORDERS - 1)]
    changes = [largest_difference(run(order), expected) for order in orders]
    return max(*changes, float(jnp.finfo(dtype).eps))
