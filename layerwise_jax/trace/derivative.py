"""Helpers to differentiate traced operations: cotangent types and which values have gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def type_of(aval: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype alone."""
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def is_inexact(x: Any) -> bool:
    """Whether an array, or a type, can have a gradient."""
    return jnp.issubdtype(x.dtype, jnp.inexact)


def cotangent(aval: Any, gradient: Any) -> Any:
    """A gradient as a vjp takes it: zeros where there is none, float0 for what has none."""
    if not is_inexact(aval):
        return np.zeros(aval.shape, jax.dtypes.float0)
    return jnp.zeros(aval.shape, aval.dtype) if gradient is None else gradient.astype(aval.dtype)
