"""Derivative rules of the user's own: they too must treat each example alone, or gradients would
change unseen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from layerwise_jax import _jax
from layerwise_jax._jax import Jaxpr, JaxprEqn
from layerwise_jax.batch.lattice import (
    NotSeparable,
    NotSeparableError,
    OpContext,
    PartialSum,
    Replicated,
    Role,
    Split,
    described,
    same,
)
from layerwise_jax.batch.pairs import ProgramPair, pair_bodies

# What comes back through one of these need not enter its gradients linearly: it may be clipped,
# say.
BACKWARD_RULES = ("custom_vjp_call", "custom_vjp_call_jaxpr")


def check_derivative(
    run: Callable[[ProgramPair, Sequence[Role]], list[Role]],
    step: OpContext,
    results: Sequence[Role],
) -> None:
    """Refuse an operation of which the gradients for the parts do not make up those for the full
    batch.

    Args:
      run: the roles of a body's outputs.
      step: a `custom_jvp` or `custom_vjp` call.
      results: the roles of its results.

    Raises:
      Mixes: gradients of what has the examples are not rows, or those of what all share not sums.
    """
    roles = (*step.roles, *results)
    has_rows = any(isinstance(role, Split) for role in roles)
    if not has_rows and step.name not in BACKWARD_RULES:
        return  # the rule of a `custom_jvp` is linear in what comes back
    if not all(_is_known(role, has_rows) for role in roles):
        return
    operands = _inexact(step.micro.invars)
    try:
        pair = pair_bodies(_backward(step.micro), _backward(step.full))
    except (TypeError, NotImplementedError):  # what has no derivative has no wrong one
        return
    cotangents = [
        results[i] if has_rows else _dual(results[i]) for i in _inexact(step.micro.outvars)
    ]
    gradients = run(pair, [*step.roles, *cotangents])
    for i, gradient in zip(operands, gradients, strict=True):
        if isinstance(gradient, NotSeparable):
            operation = described(gradient.eqn) if gradient.eqn else "an operation"
            raise NotSeparableError(
                f"has a derivative rule in which {operation} {gradient.why}", gradient.cause
            )
        fits = _fits(gradient, step, i) if has_rows else _is_dual(gradient, step.roles[i])
        if not fits:
            raise NotSeparableError("has a derivative rule that does not treat each example alone")


def _is_known(role: Role, has_rows: bool) -> bool:
    """Whether it is known how gradients of such a value for the parts make up that for the full
    batch.
    """
    if isinstance(role, PartialSum):
        return not has_rows
    return isinstance(role, Split | Replicated) and same(role.ratio, 1.0)


def _dual(role: Role) -> Role:
    """The role of the gradient: parts add to that of what they share; that of a sum over parts is
    the same for each.
    """
    return Replicated(1 / role.ratio) if isinstance(role, PartialSum) else PartialSum(1.0)


def _is_dual(gradient: Role, role: Role) -> bool:
    if isinstance(gradient, Replicated) and gradient.is_zero:
        return True
    if isinstance(role, PartialSum):
        return isinstance(gradient, Replicated) and same(gradient.ratio, 1 / role.ratio)
    return isinstance(gradient, PartialSum) and same(gradient.ratio, 1.0)


def _fits(gradient: Role, step: OpContext, operand: int) -> bool:
    """Whether the gradients of an operand for the parts make up that for the full batch."""
    if isinstance(gradient, Replicated) and gradient.is_zero:
        return True
    axis = step.axis(operand)
    if axis is None:
        return isinstance(gradient, PartialSum) and same(gradient.ratio, 1.0)
    return (
        isinstance(gradient, Split | Replicated)
        and same(gradient.ratio, 1.0)
        and getattr(gradient, "axis", axis) == axis
    )


def _inexact(variables: Sequence[Any]) -> list[int]:
    """The places of what has gradients."""
    return [i for i, var in enumerate(variables) if jnp.issubdtype(var.aval.dtype, jnp.inexact)]


def _backward(eqn: JaxprEqn) -> Jaxpr:
    """(operands, cotangents of the results) to the gradients of the operands."""
    moving, made = _inexact(eqn.invars), _inexact(eqn.outvars)

    def forward(operands: Sequence[Any], *changed: Any) -> list[Any]:
        merged = list(operands)
        for i, x in zip(moving, changed, strict=True):
            merged[i] = x
        results = _jax.bind(eqn, merged)
        return [results[i] for i in made]

    def backward(operands: Sequence[Any], cotangents: Sequence[Any]) -> Any:
        _, pull = jax.vjp(
            lambda *changed: forward(operands, *changed), *(operands[i] for i in moving)
        )
        return pull(list(cotangents))

    results: list[Any] = list(eqn.outvars)
    types = [_type_of(var) for var in eqn.invars], [_type_of(results[i]) for i in made]
    return jax.make_jaxpr(backward)(*types)


def _type_of(variable: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(
        variable.aval.shape, variable.aval.dtype, weak_type=variable.aval.weak_type
    )
