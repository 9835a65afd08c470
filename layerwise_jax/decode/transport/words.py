"""Arrays of a message as whole 16-byte pieces of unsigned integers, and back."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from layerwise_jax.decode.transport.ptx import PIECE_BYTES


def to_words(x: Any) -> Any:
    """An array as unsigned integers [words], zero-padded to whole pieces. Every bit is kept."""
    flat = _as_unsigned(x).reshape(-1)
    padding = -flat.size * flat.dtype.itemsize % PIECE_BYTES  # bytes
    return jnp.pad(flat, (0, padding // flat.dtype.itemsize)) if padding else flat


def from_words(words: Any, aval: Any) -> Any:
    """The inverse of `to_words`: the array of the type `aval`."""
    like = jax.eval_shape(_as_unsigned, aval)
    return _from_unsigned(words[: like.size].reshape(like.shape), aval)


def wire_bytes(aval: Any) -> int:
    """Bytes of an array as it is sent, without padding."""
    like = jax.eval_shape(_as_unsigned, aval)
    return math.prod(like.shape) * like.dtype.itemsize


def _as_unsigned(x: Any) -> Any:
    """The bits of an array as uint8, uint16 or uint32. Types narrower than a byte take one byte."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint8)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return _as_unsigned(jnp.stack([x.real, x.imag], axis=-1))
    width = _bits(x.dtype)
    if width < 8:
        return lax.bitcast_convert_type(x, f"uint{width}").astype(jnp.uint8)
    # 64-bit types become pairs of uint32 on a new last axis.
    return lax.bitcast_convert_type(x, f"uint{min(width, 32)}")


def _from_unsigned(bits: Any, aval: Any) -> Any:
    if aval.dtype == jnp.bool_:
        return bits.astype(jnp.bool_)
    if jnp.issubdtype(aval.dtype, jnp.complexfloating):
        part = jax.ShapeDtypeStruct((*aval.shape, 2), jnp.finfo(aval.dtype).dtype)
        pair = _from_unsigned(bits, part)  # [..., 2], real and imaginary
        return lax.complex(pair[..., 0], pair[..., 1])
    width = _bits(aval.dtype)
    if width < 8:
        return lax.bitcast_convert_type(bits.astype(f"uint{width}"), aval.dtype)
    return lax.bitcast_convert_type(bits, aval.dtype)


def _bits(dtype: Any) -> int:
    return jax.dtypes.itemsize_bits(dtype)  # pyright: ignore[reportPrivateImportUsage]
