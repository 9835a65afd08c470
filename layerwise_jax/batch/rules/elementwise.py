"""Rules for operations that work entry by entry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from layerwise_jax.batch.lattice import (
    NotSeparableError,
    OpContext,
    PartialSum,
    Replicated,
    Role,
    Split,
    build,
    known,
)
from layerwise_jax.batch.linearity import STATISTICS, additive, nonlinear, product

Rule = Callable[[OpContext], Role | list[Role]]
NONLINEAR = """
abs acos acosh and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt
ceil clamp clz complex conj cos cosh digamma eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt
igamma igamma_grad_a igammac integer_pow is_finite le le_to lgamma log log1p log2 logistic lt
lt_to max min mulhi ne nextafter not one_minus_square or polygamma polynomial population_count pow
random_clone random_gamma_grad random_seed random_unwrap random_wrap
regularized_incomplete_beta rem round rsqrt shift_left shift_right_arithmetic shift_right_logical
sign sin sinh sqrt square tan tanh threefry2x32 xor zeta
""".split()
LINEAR = (
    "add add_any copy copy_p imag name neg pvary real reduce_precision sharding_constraint "
    "stop_gradient sub"
).split()

# Operations on known numbers, such as the length of a batch on its way to a divisor.
FOLDED: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "convert_element_type": lambda x: x,
    "div": np.divide,
    "eq": np.equal,
    "exp": np.exp,
    "ge": np.greater_equal,
    "gt": np.greater,
    "le": np.less_equal,
    "log": np.log,
    "lt": np.less,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "ne": np.not_equal,
    "neg": np.negative,
    "pow": np.power,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sqrt": np.sqrt,
    "square": np.square,
    "sub": np.subtract,
}


def common_axis(step: OpContext) -> int | None:
    """Axis of the examples, where operands are paired entry by entry.

    Raises:
      NotSeparableError: two operands have them along different axes.
    """
    axes = {role.axis for role in step.roles if isinstance(role, Split)}
    if len(axes) > 1:
        raise NotSeparableError("pairs the examples along one axis with the examples along another")
    return axes.pop() if axes else None


def folded(step: OpContext) -> Role | None:
    """Role of the result where every operand is a known number, else None."""
    fills = [role.fill for role in step.roles if isinstance(role, Replicated)]
    fold = FOLDED.get(step.name)
    if fold is None or None in fills or len(fills) < len(step.roles):
        return None
    dtype = step.dtypes[1]
    with np.errstate(all="ignore"):
        # In both traces, rounded as the operation rounds.
        micro, full = (
            np.asarray(fold(*(fill[i] for fill in fills if fill))).astype(dtype)[()] for i in (0, 1)
        )
    # Integer division rounds towards zero, which np.divide does not.
    integer_division = step.name == "div" and not jnp.issubdtype(dtype, jnp.inexact)
    return None if integer_division else known(micro, full)


def _bitcast(step: OpContext) -> Role:
    """Role of bits read as another dtype: a wider one joins the entries along the last axis."""
    axis = step.axis()
    # [..., 4] of bytes to [...] of 32 bits.
    if axis is not None and axis >= len(step.result_shapes()[0]):
        raise NotSeparableError("joins the bits of several examples in one number")
    return _nonlinear(step)


def _linear(step: OpContext) -> Role:
    return build(common_axis(step), *additive(step))


def _nonlinear(step: OpContext) -> Role:
    return build(common_axis(step), *nonlinear(step))


def _mul(step: OpContext) -> Role:
    return build(common_axis(step), *product(step))


def _div(step: OpContext) -> Role:
    if not jnp.issubdtype(step.dtypes[1], jnp.inexact):  # integer division rounds
        return _nonlinear(step)
    return build(common_axis(step), *product(step, inverse=True))


def _convert(step: OpContext) -> Role:
    """Role of a cast: linear unless it rounds or clips, as a cast to float8 does.

    Rounding to 16 bits counts as rounding of arithmetic.
    """
    old, new = step.dtypes
    # itemsize 1 is float8, which saturates.
    is_number = jnp.issubdtype(new, jnp.inexact) and jnp.dtype(new).itemsize > 1
    # Integers wrap around, which is linear modulo their range; booleans saturate.
    widens = is_number or (jnp.issubdtype(old, jnp.integer) and jnp.issubdtype(new, jnp.integer))
    return _linear(step) if widens and old != np.bool_ else _nonlinear(step)


def chosen_case(step: OpContext) -> Role | None:
    """Role of the case that a `select_n` always takes, if that is known."""
    predicate, *cases = step.roles
    if (
        isinstance(predicate, Replicated)
        and predicate.fill
        and predicate.fill[0] == predicate.fill[1]
    ):
        return cases[int(predicate.fill[0])]
    return None


def _select(step: OpContext) -> Role:
    """Role of a choice between cases: linear in them together, whatever chooses."""
    predicate, *cases = step.roles
    nonlinear(step, [0])
    if isinstance(predicate, Split) and any(isinstance(case, PartialSum) for case in cases):
        raise NotSeparableError(STATISTICS)
    return build(common_axis(step), *additive(step, range(1, len(step.roles))))


def _barrier(step: OpContext) -> list[Role]:
    return list(step.roles)


RULES: dict[str, Rule] = {
    **dict.fromkeys(NONLINEAR, _nonlinear),
    **dict.fromkeys(LINEAR, _linear),
    "bitcast_convert_type": _bitcast,
    "mul": _mul,
    "div": _div,
    "convert_element_type": _convert,
    "select_n": _select,
    "optimization_barrier": _barrier,
    "device_put": _barrier,
}
