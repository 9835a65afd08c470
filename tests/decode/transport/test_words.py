"""Arrays as whole pieces of words, and back, bit by bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layerwise_jax.decode.transport.words import from_words, to_words, wire_bytes

DTYPES = """
    bool int4 uint2 int8 float8_e4m3fn float4_e2m1fn bfloat16 float16 int32 float32 complex64
""".split()
SHAPES = [(), (1,), (3, 5), (16,)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_words_keep_every_bit(dtype):
    for shape in SHAPES:
        values = 3 * np.random.default_rng(3).normal(size=shape)
        x = jnp.asarray(values > 0) if dtype == "bool" else jnp.asarray(values).astype(dtype)
        words = to_words(x)
        assert words.ndim == 1
        assert jnp.issubdtype(words.dtype, jnp.unsignedinteger)
        size = words.size * words.dtype.itemsize
        assert size % 16 == 0
        assert 0 <= size - wire_bytes(x) < 16
        back = from_words(words, jax.typeof(x))
        assert (back.dtype, back.shape) == (x.dtype, x.shape)
        wide = [np.asarray(each.astype(jnp.complex64)) for each in (back, x)]
        np.testing.assert_array_equal(*wide)


def test_words_keep_the_payload_of_a_nan_and_the_sign_of_zero():
    bits = jnp.asarray([0x7FA00001, 0xFFC12345, 0x80000000], jnp.uint32)
    x = jax.lax.bitcast_convert_type(bits, jnp.float32)
    back = from_words(to_words(x), jax.typeof(x))
    np.testing.assert_array_equal(jax.lax.bitcast_convert_type(back, jnp.uint32), bits)


def test_words_of_64_bit_numbers():
    with jax.enable_x64(True):
        x = jnp.asarray([1.5, -2.25, 1e300], jnp.float64)
        words = to_words(x)
        assert words.dtype == jnp.uint32
        assert words.size == 8  # 24 bytes in two pieces
        np.testing.assert_array_equal(from_words(words, jax.typeof(x)), x)
