"""Linearity of a jaxpr in some of its inputs, by abstract interpretation.

Gradients of microbatches are seeded with their share of the loss's cotangent. A derivative rule
that is linear in the cotangent passes the share on; a rule that clips it or adds a constant does
not.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from enum import IntEnum
from typing import Any

import numpy as np

from layerwise_jax import _jax
from layerwise_jax._jax import Jaxpr, JaxprEqn, Literal
from layerwise_jax.trace.primitives import CALL_LIKE


class Degree(IntEnum):
    """Dependence on the chosen inputs; of two operands that are added, the larger."""

    ZERO = 0
    LINEAR = 1
    CONSTANT = 2
    NONLINEAR = 3


# Linear in all operands together.
SUMS = frozenset(
    "add add_any sub neg convert_element_type reduce_sum cumsum broadcast_in_dim reshape transpose "
    "squeeze expand_dims concatenate pad rev slice split stack unstack tile copy copy_p real imag "
    "conj reduce_window_sum reduce_precision stop_gradient optimization_barrier name fft".split()
)
# Linear in each operand, the others held.
PRODUCTS = frozenset("mul dot_general conv_general_dilated ragged_dot_general complex_mul".split())
# Linear in these operands together, the others held.
LINEAR_IN = {
    "div": (0,),
    "gather": (0,),
    "dynamic_slice": (0,),
    "dynamic_update_slice": (0, 1),
    "scatter": (0, 2),
    "scatter-add": (0, 2),
    "scatter-sub": (0, 2),
    "triangular_solve": (1,),
    "random_gamma_grad": (),
}
MOST_ITERATIONS = 100


def is_linear(jaxpr: Jaxpr, inputs: Collection[int]) -> bool:
    """True if every output is linear in the inputs at these positions, or zero."""
    given = [Degree.LINEAR if i in inputs else Degree.CONSTANT for i in range(len(jaxpr.invars))]
    return all(degree <= Degree.LINEAR for degree in _run(jaxpr, given))


def _run(jaxpr: Jaxpr, given: Sequence[Degree]) -> list[Degree]:
    """Degrees of the outputs, given those of the inputs."""
    env: dict[Any, Degree] = dict.fromkeys(jaxpr.constvars, Degree.CONSTANT)
    env.update(zip(jaxpr.invars, given, strict=True))

    def read(atom: Any) -> Degree:
        if not isinstance(atom, Literal):  # a value
            return env[atom]
        # Adding a literal 0 keeps a value linear.
        return Degree.CONSTANT if np.any(atom.val) else Degree.ZERO

    for eqn in jaxpr.eqns:
        degrees = _results(eqn, [read(atom) for atom in eqn.invars])
        env.update(zip(eqn.outvars, degrees, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _results(eqn: JaxprEqn, operands: Sequence[Degree]) -> list[Degree]:
    name = eqn.primitive.name
    count = len(eqn.outvars)
    if name in CALL_LIKE:
        return _run(_jax.inner_jaxpr(eqn), operands)
    if name == "scan":
        return _scan(eqn, operands)
    if name == "cond":
        branches = [_run(branch, operands[1:]) for branch in eqn.params["branches"]]
        # Either branch: linear if all are, in the same cotangents.
        joined = [_sum(degrees) for degrees in zip(*branches, strict=True)]
        # operands[0] is the branch index.
        return joined if _is_constant(operands[:1]) else [Degree.NONLINEAR] * count
    if name in SUMS:
        return [_sum(operands)] * count
    if name in PRODUCTS:
        return [_product(operands)] * count
    if name == "select_n":
        return [_sum(operands[1:]) if _is_constant(operands[:1]) else Degree.NONLINEAR]
    if name in LINEAR_IN:
        moving = LINEAR_IN[name]
        held = [degree for i, degree in enumerate(operands) if i not in moving]
        return [_sum([operands[i] for i in moving]) if _is_constant(held) else Degree.NONLINEAR]
    return [Degree.CONSTANT if _is_constant(operands) else Degree.NONLINEAR] * count


def _scan(eqn: JaxprEqn, operands: Sequence[Degree]) -> list[Degree]:
    consts, carry, scanned = _jax.scan_parts(eqn, operands)
    body = _jax.inner_jaxpr(eqn)
    for _ in range(MOST_ITERATIONS):
        results = _run(body, [*consts, *carry, *scanned])
        # The carry may be its initial value or an iteration's result: join until nothing changes.
        after = [_sum(pair) for pair in zip(carry, results[: len(carry)], strict=True)]
        if after == carry:
            return results
        carry = after
    return [Degree.NONLINEAR] * len(eqn.outvars)


def _is_constant(degrees: Sequence[Degree]) -> bool:
    return all(degree in (Degree.ZERO, Degree.CONSTANT) for degree in degrees)


def _sum(degrees: Sequence[Degree]) -> Degree:
    """Degree of a sum, a choice or an array put together: linear plus constant is neither."""
    found = set(degrees) - {Degree.ZERO}  # zero is linear and constant
    if len(found) > 1:
        return Degree.NONLINEAR
    return found.pop() if found else Degree.ZERO


def _product(degrees: Sequence[Degree]) -> Degree:
    if Degree.ZERO in degrees:
        return Degree.ZERO
    # x * x is quadratic.
    if Degree.NONLINEAR in degrees or degrees.count(Degree.LINEAR) > 1:
        return Degree.NONLINEAR
    return Degree.LINEAR if Degree.LINEAR in degrees else Degree.CONSTANT
