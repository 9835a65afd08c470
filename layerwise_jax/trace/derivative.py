"""Derivatives of traced operations: which values have gradients, and vjps with respect to them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def type_of(aval: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a value, without sharding or weak type."""
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def is_inexact(x: Any) -> bool:
    """True if an array or type is floating-point or complex, and so can have a gradient."""
    return jnp.issubdtype(x.dtype, jnp.inexact)


def cotangent(aval: Any, gradient: Any) -> Any:
    """Cotangent of a value of type `aval` as `jax.vjp` takes it.

    Returns:
      float0 zeros for integers and keys; zeros where `gradient` is None; else the gradient, cast.
    """
    if not is_inexact(aval):
        return np.zeros(aval.shape, jax.dtypes.float0)
    return jnp.zeros(aval.shape, aval.dtype) if gradient is None else gradient.astype(aval.dtype)


def ones_cotangent(x: Any) -> Any:
    """Cotangent of ones for an array: float0 zeros for integers and keys."""
    return jnp.ones(x.shape, x.dtype) if is_inexact(x) else cotangent(x, None)


def vjp_wrt[Key](
    fn: Callable[[dict[Key, Any]], Any], values: Mapping[Key, Any], moving: Collection[Key]
) -> tuple[Any, Callable[..., tuple[dict[Key, Any]]]]:
    """`jax.vjp` of `fn(values)` with respect to some of the values.

    Args:
      fn: a function of values by key.
      values: all values by key.
      moving: keys of the values to differentiate; they must be inexact.

    Returns:
      (results, vjp_fn): as `jax.vjp` returns them. `vjp_fn(cotangents)` is a tuple of one dict, the
      gradient of each moving value by key.
    """
    fixed = {key: value for key, value in values.items() if key not in moving}

    def run(changed: dict[Key, Any]) -> Any:
        return fn({**fixed, **changed})

    return jax.vjp(run, {key: values[key] for key in moving})
