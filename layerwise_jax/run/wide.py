"""Weight products in float32: a microbatch's gradient is not rounded before it is accumulated.

With weights in bfloat16 or float16, the VJP rounds a weight's gradient to that dtype, and the
accumulator adds it in float32. Here the product that makes the gradient returns float32 instead:
nothing is rounded, and on GPUs the product adds into the accumulator (cuBLASLt, beta = 1).

    cotangent, activation ─dot_general→ bf16 ─transpose→ bf16        gradient, before
    cotangent, activation ─dot_general→ f32  ─transpose→ f32         gradient, after
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from layerwise_jax.trace.products import flatten_backward


def gradients_of(
    vjp_fn: Callable, cotangents: Any, weights: Mapping[Hashable, Any]
) -> dict[Any, Any]:
    """The gradients that `vjp_fn` returns, those of narrow weights in float32 where possible.

    Args:
      vjp_fn: a VJP function of one dict.
      cotangents: its argument.
      weights: the weights among the dict's entries, by key.
    """
    narrow = {key for key, weight in weights.items() if _is_narrow(weight.dtype)}
    # A VJP function is a pytree of its residuals: a jaxpr must not close over traced arrays.
    leaves, tree = jax.tree.flatten((vjp_fn, cotangents))
    keys: list[Any] = []

    def run(*leaves: Any) -> list[Any]:
        rebuilt, given = jax.tree.unflatten(tree, leaves)
        (gradients,) = rebuilt(given)
        # gradients of narrow weights first
        keys[:] = sorted(gradients, key=lambda key: key not in narrow)
        return [gradients[key] for key in keys]

    if narrow:
        closed = jax.make_jaxpr(run)(*leaves)
        # None: a checkpoint forbids to open the jaxpr
        backward = flatten_backward(closed, len(narrow.intersection(keys)), 0)
        if backward is not None:
            return dict(zip(keys, backward.run(leaves, widens=True), strict=True))
    (gradients,) = vjp_fn(cotangents)
    return gradients


def _is_narrow(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize < 4
