"""Rules for a maximum or minimum over examples on its way to an output.

The largest of the parts' maxima is the maximum of the batch, and stays so through operations that
keep or reverse the order of numbers. Any other use mixes examples.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from layerwise_jax.batch.lattice import (
    Extreme,
    NotSeparableError,
    OpContext,
    PartialExtreme,
    Replicated,
    Role,
    same,
)
from layerwise_jax.batch.linearity import EXTREME

# Order-preserving in every entry, or a new shape.
INCREASING = frozenset(
    "reshape broadcast_in_dim squeeze expand_dims transpose copy copy_p slice sqrt name "
    "reduce_precision optimization_barrier add".split()
)
DECREASING = frozenset({"neg", "not"})
OF_SAME_KIND: dict[Extreme, frozenset[str]] = {
    "max": frozenset("max or reduce_max reduce_or".split()),
    "min": frozenset("min and reduce_min reduce_and".split()),
}
REDUCTIONS: dict[str, Extreme] = {
    "reduce_max": "max",
    "reduce_or": "max",
    "reduce_min": "min",
    "reduce_and": "min",
}
"""Reductions over the examples whose results the parts combine to."""


def extreme_through(step: OpContext) -> Role:
    """Role of the result of an operation that reads a maximum or minimum over examples.

    Raises:
      NotSeparableError: the operation does more than to keep or reverse the order.
    """
    found: list[Extreme] = [x.which for x in step.roles if isinstance(x, PartialExtreme)]
    others = [role for role in step.roles if not isinstance(role, PartialExtreme)]
    unscaled = all(isinstance(role, Replicated) and same(role.ratio, 1) for role in others)
    which = found[0]
    # max(max over examples, constant) = max over examples of max(x, constant)
    if unscaled and len(set(found)) == 1 and step.name in OF_SAME_KIND[which]:
        return PartialExtreme(which)
    if unscaled and len(found) == 1:  # two may be those of different examples
        # c - max(x) = min(c - x): the order is reversed.
        subtracts = step.name == "sub" and isinstance(step.roles[1], PartialExtreme)
        if step.name in DECREASING or subtracts:
            return PartialExtreme("min" if which == "max" else "max")
        if step.name in INCREASING or step.name == "sub" or _is_increasing_cast(step):
            return PartialExtreme(which)
    raise NotSeparableError(EXTREME)


def _is_increasing_cast(step: OpContext) -> bool:
    """True if a cast keeps the order: to floats, from booleans, or to integers at least as wide."""
    if step.name != "convert_element_type":
        return False
    old, new = step.dtypes
    if old == np.bool_ or jnp.issubdtype(new, jnp.floating):
        return True
    if not (jnp.issubdtype(old, jnp.integer) and jnp.issubdtype(new, jnp.integer)):
        return False
    return bool(
        jnp.iinfo(new).min <= jnp.iinfo(old).min and jnp.iinfo(old).max <= jnp.iinfo(new).max
    )
