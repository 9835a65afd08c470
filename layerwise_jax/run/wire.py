"""Wire format of values between devices, and arithmetic on values of any dtype.

Random keys are held, sent and added as their uint32 data: no collective and no `where` takes keys.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from layerwise_jax._jax import is_key, wrap_key


def to_wire(value: Any) -> Any:
    """A value as it is held and sent: random keys [...] as uint32 data [..., words]."""
    value = jnp.asarray(value)
    return jax.random.key_data(value) if is_key(value) else value


def from_wire(value: Any, aval: Any) -> Any:
    """The inverse of `to_wire`, given the type of the value."""
    return wrap_key(value, aval) if is_key(aval) else value


def wire_aval(aval: Any) -> Any:
    """The type of `to_wire` of a value of type `aval`."""
    shape = jax.ShapeDtypeStruct(aval.shape, aval.dtype)
    return jax.eval_shape(jax.random.key_data, shape) if is_key(aval) else shape


def choose(condition: Any, a: Any, b: Any) -> Any:
    """`jnp.where` that takes random keys too."""
    return from_wire(jnp.where(condition, to_wire(a), to_wire(b)), jax.typeof(a))


def sum_dtype(dtype: Any) -> Any:
    """The dtype in which a sum over microbatches is kept: integers as they are, else >= float32."""
    if jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize < 4:
        return jnp.dtype(jnp.float32)  # promote_types refuses float8
    return dtype if jnp.issubdtype(dtype, jnp.integer) else jnp.promote_types(dtype, jnp.float32)


def fill(aval: Any, value: float) -> Any:
    """An array of a type, filled with `value`, or with zeros if the type is not inexact."""
    return jnp.full(aval.shape, value if jnp.issubdtype(aval.dtype, jnp.inexact) else 0, aval.dtype)


def zeros_of(aval: Any) -> Any:
    """Zeros in the wire format of a type."""
    return fill(wire_aval(aval), 0.0)
