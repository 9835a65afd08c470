"""Check of custom derivative rules: gradients of the parts must add up to those of the full batch.

The cotangent of a value follows from the value's role. With full = ratio * (role of the parts):

    value          cotangent
    Split          Split, ratio 1 / ratio             each example's own
    Replicated     PartialSum, ratio 1 / ratio        parts add their shares
    PartialSum     Replicated, ratio 1 / ratio        a sum passes its cotangent to every part

A rule gets cotangents of these roles for its results and must return such ones for its operands.
One that is off by a constant factor (a loss injected as the constant 1, a mean where a sum is due)
is corrected by that factor; any other is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from layerwise_jax import _jax
from layerwise_jax._jax import Jaxpr, JaxprEqn
from layerwise_jax.batch.lattice import (
    NotSeparable,
    NotSeparableError,
    OpContext,
    PartialExtreme,
    PartialSum,
    Permuted,
    Ratio,
    Replicated,
    Role,
    Split,
    described,
    one_scaling_axis,
    same,
)
from layerwise_jax.batch.linear_maps import is_linear
from layerwise_jax.batch.linearity import EXTREME
from layerwise_jax.batch.pairs import ProgramPair, pair_bodies

# Rules that need not be linear in the cotangent; JAX transposes those of `custom_jvp`, which are.
BACKWARD_RULES = ("custom_vjp_call", "custom_vjp_call_jaxpr")

NOT_ALONE = "has a derivative rule that does not treat each example by itself"
NOT_LINEAR = (
    "has a derivative rule that is not linear in its cotangent, of which each part has a share only"
)


def check_derivative(
    run: Callable[[ProgramPair, Sequence[Role]], list[Role]],
    step: OpContext,
    results: Sequence[Role],
    per_microbatch: bool,
) -> JaxprEqn | None:
    """Check the derivative rule of a `custom_jvp` or `custom_vjp` call.

    Args:
      run: roles of a body's outputs, given those of its inputs.
      step: the call.
      results: roles of its results.
      per_microbatch: whether a rule that mixes examples may treat each part as a batch by itself;
        it must then be linear in the cotangents, which the parts scale.

    Returns:
      The call with corrected gradients, to be run on a part; None where they are right.

    Raises:
      NotSeparableError: the gradients of the parts do not add up to those of the full batch.
    """
    # The rule of a `custom_jvp` is linear: without examples its transpose is right.
    has_examples = any(isinstance(role, Split | Permuted) for role in step.roles)
    if not has_examples and step.name not in BACKWARD_RULES:
        return None  # linear in the cotangent
    if not per_microbatch and any(isinstance(role, NotSeparable) for role in results):
        return None  # refused where it is used
    try:
        micro, full = _backward(step.micro), _backward(step.full)  # traced, not run
    except (TypeError, NotImplementedError):  # not differentiable
        return None
    try:
        # Interpret the backward rule as any function: operands and cotangents in, gradients out.
        factors = _factors(run(pair_bodies(micro, full), _operands(step, results)), step)
        # JAX transposes a custom_jvp: a factor here means a wrong tangent, which is not rescaled.
        if step.name not in BACKWARD_RULES and any(factor != 1 for factor in factors):
            raise NotSeparableError(NOT_ALONE)
    except NotSeparableError as error:
        if not per_microbatch:
            raise
        if not _is_linear_rule(micro, step):
            raise NotSeparableError(NOT_LINEAR, "derivative") from error
        return None
    return _corrected(step.micro, factors) if any(factor != 1 for factor in factors) else None


def _operands(step: OpContext, results: Sequence[Role]) -> list[Role]:
    """Roles of the operands and of the cotangents of the results."""
    made = _inexact(step.micro.outvars)
    axes = [one_scaling_axis(*step.result_shapes(i)) for i in made]
    # Integer results have float0 cotangents and are left out.
    return [*step.roles, *(_dual(results[i], axis) for i, axis in zip(made, axes, strict=True))]


def _dual(role: Role, axis: int | None) -> Role:
    """Role of the cotangent of a result that has the examples along `axis`, or no such axis."""
    if isinstance(role, PartialSum):
        return Replicated(1 / role.ratio)
    if isinstance(role, Split | Permuted):
        # d loss / d part = ratio * d loss / d full, so the cotangent's ratio is the inverse.
        return replace(role, ratio=1 / role.ratio)
    if isinstance(role, Replicated):
        # Each part's cotangent of a shared value is its share of the sum.
        return PartialSum(1 / role.ratio) if axis is None else Split(axis, 1 / role.ratio)
    if isinstance(role, PartialExtreme):
        raise NotSeparableError(EXTREME)
    assert isinstance(role, NotSeparable), role
    return role


def _factors(gradients: Sequence[Role], step: OpContext) -> list[float]:
    """Factor by which a part multiplies each operand's gradient, operands with gradients only."""
    operands = _inexact(step.micro.invars)
    return [_factor(g, step, i) for i, g in zip(operands, gradients, strict=True)]


def _factor(gradient: Role, step: OpContext, operand: int) -> float:
    # Zeros are right under every factor.
    if isinstance(gradient, Replicated) and gradient.is_zero:
        return 1.0  # nothing to add up
    role = step.roles[operand]
    if isinstance(gradient, NotSeparable):
        operation = described(gradient.eqn) if gradient.eqn else "an operation"
        raise NotSeparableError(
            f"has a derivative rule in which {operation} {gradient.why}", gradient.cause
        )
    if isinstance(role, NotSeparable | PartialExtreme):
        what = f"that no parts combine to: {role}"
        if isinstance(role, PartialExtreme):
            what = f"that is a {role.which} over the examples"
        cause = role.cause if isinstance(role, NotSeparable) else "statistics"
        raise NotSeparableError(
            f"has a derivative rule that injects a gradient into a value {what}", cause
        )
    if isinstance(role, Permuted) or isinstance(gradient, Permuted):
        return _factor_in_order(gradient, role)
    assert isinstance(role, Split | Replicated | PartialSum), role
    assert isinstance(gradient, Split | Replicated | PartialSum), gradient
    axis = step.axis(operand)  # of the examples, None for what all share
    # part's cotangent = role.ratio * full cotangent, and full = gradient.ratio * the rule's result.
    factor = role.ratio * gradient.ratio
    if axis is not None:  # [..., examples, ...]: each example's own gradient
        if getattr(gradient, "axis", axis) == axis:
            return _exact(factor)
    elif isinstance(role, Replicated):
        # What every part adds in full counts `parts` times in their sum.
        return _exact(factor if isinstance(gradient, PartialSum) else factor / step.parts)
    elif isinstance(gradient, Replicated):
        return _exact(factor)
    raise NotSeparableError(NOT_ALONE)


def _factor_in_order(gradient: Role, role: Role) -> float:
    """Factor for rows in an order of the examples, whose gradients must be in the same order."""
    if not (isinstance(role, Permuted) and isinstance(gradient, Permuted)):
        raise NotSeparableError(NOT_ALONE)
    if (role.axis, role.by) != (gradient.axis, gradient.by):
        raise NotSeparableError(NOT_ALONE)
    return _exact(role.ratio * gradient.ratio)


def _exact(factor: Ratio) -> float:
    return 1.0 if same(factor, 1.0) else float(factor)


def _is_linear_rule(backward: Jaxpr, step: OpContext) -> bool:
    """True if gradients scale with the cotangents, which come after the operands."""
    num_operands = len(step.micro.invars)
    return is_linear(backward, range(num_operands, len(backward.invars)))


def _inexact(variables: Sequence[Any]) -> list[int]:
    """Positions of the variables that have gradients."""
    return [i for i, var in enumerate(variables) if jnp.issubdtype(var.aval.dtype, jnp.inexact)]


def _backward(eqn: JaxprEqn) -> Jaxpr:
    """(operands, cotangents of the inexact results) -> gradients of the inexact operands."""
    made = _inexact(eqn.outvars)

    def backward(operands: Sequence[Any], cotangents: Sequence[Any]) -> Any:
        return _pull(eqn, operands)[1](list(cotangents))

    results: list[Any] = list(eqn.outvars)
    # Types only: the rule is traced, never run here.
    types = [_type_of(var) for var in eqn.invars], [_type_of(results[i]) for i in made]
    return jax.make_jaxpr(backward)(*types)


def _pull(eqn: JaxprEqn, operands: Sequence[Any]) -> tuple[list[Any], Callable[..., Any]]:
    """All results of a call, and its vjp function: inexact results -> inexact operands."""
    moving = _inexact(eqn.invars)
    made = _inexact(eqn.outvars)

    def forward(*changed: Any) -> tuple[list[Any], list[Any]]:
        # Integer operands stay fixed; only inexact ones are differentiated.
        merged = list(operands)
        for i, x in zip(moving, changed, strict=True):
            merged[i] = x
        results = _jax.bind(eqn, merged)
        return [results[i] for i in made], results

    _, pull, results = jax.vjp(forward, *(operands[i] for i in moving), has_aux=True)
    return results, pull


def _corrected(eqn: JaxprEqn, factors: Sequence[float]) -> JaxprEqn:
    """The same call with the gradient of each inexact operand multiplied by its factor."""
    moving = _inexact(eqn.invars)
    made = _inexact(eqn.outvars)

    # A call of the same kind, so that no later pass sees another operation.
    @jax.custom_vjp
    def call(*operands: Any) -> list[Any]:
        return _jax.bind(eqn, operands)

    def forward(*operands: Any) -> tuple[list[Any], Any]:
        return _pull(eqn, operands)

    def backward(pull: Any, cotangents: Sequence[Any]) -> tuple[Any, ...]:
        gradients = pull([cotangents[i] for i in made])
        scaled = [g * jnp.asarray(c, g.dtype) for g, c in zip(gradients, factors, strict=True)]
        by_operand = dict(zip(moving, scaled, strict=True))
        # None is custom_vjp's zero for operands without a gradient.
        return tuple(by_operand.get(i) for i in range(len(eqn.invars)))

    call.defvjp(forward, backward)
    traced = jax.make_jaxpr(call)(*map(_type_of, eqn.invars))
    # The trace of `call` is one custom_vjp equation, which replaces `eqn` in the program.
    (wrapped,) = traced.eqns
    return wrapped.replace(source_info=eqn.source_info, ctx=eqn.ctx)


def _type_of(variable: Any) -> jax.ShapeDtypeStruct:
    aval = variable.aval
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)
