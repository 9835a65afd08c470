"""CRC-32 checksums of arrays, also of arrays whose blocks are held by several processes."""

from __future__ import annotations

import zlib
from typing import Any

import jax
import numpy as np

from layerwise_jax import processes
from layerwise_jax._jax import is_key

POLYNOMIAL = 0xEDB88320  # CRC-32 of zlib, reflected
Block = tuple[int, int, int]  # first row, bytes, CRC-32


def checksums(leaves: dict[str, Any]) -> dict[str, int]:
    """CRC-32 of every leaf's bytes in C order, by name; of random keys, that of their data.

    A leaf is an array on the host or a global array. Every process calls this with the same names.
    """
    data = {name: jax.random.key_data(x) if is_key(x) else x for name, x in leaves.items()}
    found = {name: crc(np.asarray(x)) for name, x in data.items() if not processes.is_partial(x)}
    shared = {name: _local_blocks(x) for name, x in data.items() if name not in found}
    if not shared:
        return found
    gathered = processes.all_gather(shared)
    for name in shared:
        blocks = sorted(tuple(block) for process in gathered for block in process[name])
        found[name] = _joined(blocks)
    return {name: found[name] for name in leaves}


def crc(array: np.ndarray) -> int:
    """CRC-32 of an array's bytes."""
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def _local_blocks(array: jax.Array) -> list[Block]:
    """Blocks of rows of this process (start, bytes, CRC-32); each row belongs to one process."""
    return [(start, rows.nbytes, crc(rows)) for start, rows in processes.blocks_of(array)]


def _joined(blocks: list[Any]) -> int:
    """CRC-32 of blocks one after the other."""
    whole = 0
    for _, length, block in blocks:
        whole = combine(whole, block, length)
    return whole


def combine(first: int, second: int, length: int) -> int:
    """CRC-32 of two byte strings joined, from theirs and the second's length in bytes.

    A zero bit appended to a message multiplies its CRC by x modulo the polynomial, so `length`
    bytes multiply by x^(8 length); the second CRC is then added (xor).
    """
    return _multiply(_power(8 * length), first) ^ second


def _power(exponent: int) -> int:
    """x^exponent modulo the polynomial, by repeated squaring; bit 31 is the coefficient of 1."""
    result = 1 << 31
    square = 1 << 30  # x
    while exponent:
        if exponent & 1:
            result = _multiply(square, result)
        square = _multiply(square, square)
        exponent >>= 1
    return result


def _multiply(a: int, b: int) -> int:
    """The product of two polynomials modulo the polynomial."""
    product = 0
    for bit in range(31, -1, -1):  # from the coefficient of 1 upwards
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (POLYNOMIAL if b & 1 else 0)
    return product
