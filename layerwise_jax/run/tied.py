"""Derivatives of a call with respect to tied weights: all copies of a weight count as one.

A weight that several stages use has a copy on the device of each. Values need nothing here: copies
are equal. Derivatives treat the copies as one variable, so that `jax.grad` of a call is that of the
function:

    reverse mode   every copy gets the sum of all copies' cotangents
    forward mode   every copy gets the tangent of the first copy, the one that `gather` returns

Neither map is the transpose of the other as a matrix over all copies, but both are exact where
copies are equal: a tangent from `place` is equal in all copies, and so is every gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from layerwise_jax._jax import linear_primitive
from layerwise_jax.mesh import STAGE
from layerwise_jax.trace.program import Weight

# The places of one weight: (position among the operands, device).
Copies = tuple[tuple[tuple[int, int], ...], ...]


def tie_copies(
    weights: Sequence[Any], copies: Mapping[Weight, Sequence[tuple[int, int]]]
) -> list[Any]:
    """On a device: the same weights, whose derivatives treat copies of a tied weight as one.

    Args:
      weights: this device's shard of every slot.
      copies: for every weight its (slot, device) places.
    """
    tied = [
        places
        for places in copies.values()
        if len(places) > 1 and jnp.issubdtype(weights[places[0][0]].dtype, jnp.inexact)
    ]
    slots = sorted({j for places in tied for j, _ in places})
    if not slots:
        return list(weights)
    # the primitive takes tied slots only: operand n is slot slots[n]
    position = {j: n for n, j in enumerate(slots)}
    places = tuple(tuple((position[j], device) for j, device in each) for each in tied)
    result = list(weights)
    for j, x in zip(slots, _tie(places, *(weights[j] for j in slots)), strict=True):
        result[j] = x
    return result


def _tie(copies: Copies, *weights: Any) -> Sequence[Any]:
    """The identity with the derivative rules above."""

    @jax.custom_jvp
    def tied(*weights: Any) -> tuple[Any, ...]:
        return weights

    @tied.defjvp
    def tied_jvp(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
        moved = _tied_tangents.bind(*tangents, is_transposed=False, copies=copies)
        return tuple(primals), tuple(moved)

    return tied(*weights)


def spread_first(*tangents: Any, copies: Copies) -> list[Any]:
    """On a device: the tangent of the first copy in every copy; others as they are."""
    return _replace_copies(tangents, copies, lambda places: places[:1])


def sum_copies(*cotangents: Any, copies: Copies) -> list[Any]:
    """On a device: the sum of all copies' cotangents in every copy; others as they are."""
    return _replace_copies(cotangents, copies, lambda places: places)


def _replace_copies(values: Sequence[Any], copies: Copies, sources: Callable) -> list[Any]:
    """Every copy replaced by the sum over its weight's `sources`, by one all-reduce a weight."""
    device, result = lax.axis_index(STAGE), list(values)
    for places in copies:
        mine = sum(
            jnp.where(device == row, values[j], jnp.zeros_like(values[j]))
            for j, row in sources(places)
        )
        # mine: zeros on devices that have no source; the sum reaches every device
        total = lax.psum(mine, STAGE)
        for j, row in places:
            result[j] = jnp.where(device == row, total, result[j])
    return result


_tied_tangents = linear_primitive("tied_tangents", spread_first, sum_copies)
