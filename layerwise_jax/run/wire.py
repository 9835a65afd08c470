"""Wire format of values between devices: keys as uint32 data, and arithmetic on values of any
dtype.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from layerwise_jax._jax import is_key, wrap_key


def to_wire(value: Any) -> Any:
    """A value in the form in which it is held and sent: random keys as their data."""
    value = jnp.asarray(value)
    return jax.random.key_data(value) if is_key(value) else value


def from_wire(value: Any, aval: Any) -> Any:
    """The inverse of `to_wire`, given the value's type."""
    return wrap_key(value, aval) if is_key(aval) else value


def wire_aval(aval: Any) -> Any:
    """The type of `to_wire` of a value of this type."""
    shape = jax.ShapeDtypeStruct(aval.shape, aval.dtype)
    return jax.eval_shape(jax.random.key_data, shape) if is_key(aval) else shape


def choose(condition: Any, a: Any, b: Any) -> Any:
    """`where`, for random keys too."""
    return from_wire(jnp.where(condition, to_wire(a), to_wire(b)), jax.typeof(a))


def sum_dtype(dtype: Any) -> Any:
    """What a sum over microbatches is kept in: integers as they are, all else in float32 at
    least.
    """
    if jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize < 4:
        return jnp.dtype(jnp.float32)  # float8 has no promotion
    return dtype if jnp.issubdtype(dtype, jnp.integer) else jnp.promote_types(dtype, jnp.float32)


def fill(aval: Any, value: float) -> Any:
    """An array of a type, filled with a value, or with zeros where the type is not inexact."""
    return jnp.full(aval.shape, value if jnp.issubdtype(aval.dtype, jnp.inexact) else 0, aval.dtype)


def _key(operand: Any) -> Any:
    """Literals have no identity of their own as mapping keys."""
    return operand if isinstance(operand, int) else id(operand)
