"""Scaling of an operation's result, by whether the operation is linear in its operands.

Each function takes the operands that matter and returns (ratio, is it a partial sum) for
`lattice.build`, or raises `NotSeparableError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import prod

from layerwise_jax.batch.lattice import (
    SIZE,
    NotSeparableError,
    OpContext,
    PartialExtreme,
    PartialSum,
    Permutation,
    Permuted,
    Ratio,
    Replicated,
    Role,
    Split,
    same,
)

STATISTICS = (
    "uses a sum or mean over the examples in the computation of each example (as batch "
    "normalisation in training does)"
)
EXTREME = "uses one result over all examples (a maximum or minimum) in a further computation"
ORDERED = "uses the examples in an order that depends on all of them"
ONE = Fraction(1)


def additive(step: OpContext, operands: Sequence[int] | None = None) -> tuple[Ratio, bool]:
    """Scaling of what is linear in these operands together: a sum, a choice, a new shape."""
    chosen = _chosen(step, operands)
    # Zeros scale as anything does.
    roles = [role for role in chosen if not (isinstance(role, Replicated) and role.is_zero)]
    summed = _has_sums(roles)
    # A value that every part has in full counts `parts` times in the sum of the parts.
    ratios = [
        _ratio(role) / (step.parts if summed and isinstance(role, Replicated) else 1)
        for role in roles
    ]
    # r * x + r * y = r * (x + y): linear with one common ratio.
    if all(same(ratio, ratios[0]) for ratio in ratios):
        return (ratios[0] if ratios else ONE), summed
    if not summed:  # x + batch_size
        raise NotSeparableError(SIZE, "size")
    if all(isinstance(role, PartialSum) for role in roles):
        raise NotSeparableError(
            "adds a mean over the examples to a sum over the examples, which combine differently"
        )
    raise NotSeparableError(
        "adds something that does not depend on the batch (such as weight decay) to a sum over "
        "examples, so that the sum over the parts would count it once a part; added to a mean over "
        "the examples it would be right"
    )


def product(
    step: OpContext, operands: Sequence[int] = (0, 1), inverse: bool = False
) -> tuple[Ratio, bool]:
    """Scaling of what is linear in each operand, the others held.

    Args:
      step: the operation.
      operands: positions of the factors.
      inverse: whether the second one divides.
    """
    roles = _chosen(step, operands)
    summed = _has_sums(roles)
    if inverse and isinstance(roles[1], PartialSum):
        both = isinstance(roles[0], PartialSum)  # a weighted mean, say
        raise NotSeparableError(
            "divides a sum over the examples by another one that depends on parameters, and the "
            "ratios of the parts do not add up to the ratio of the batch; return numerator and "
            "denominator as two outputs"
            if both
            else "divides by a sum over the examples"
        )
    if sum(isinstance(role, PartialSum) for role in roles) > 1:
        raise NotSeparableError(
            "multiplies a sum over the examples by another one (as a load-balancing loss does), "
            "and the products of the parts do not add up to the product of the batch; return the "
            "factors as two outputs"
        )
    # (a * x) * (b * y) = (a * b) * (x * y)
    ratios = [_ratio(role) for role in roles]
    if inverse:
        # (a * x) / (b * y) = (a / b) * (x / y)
        return ratios[0] / ratios[1], summed
    return prod(ratios, start=ONE), summed


def nonlinear(step: OpContext, operands: Sequence[int] | None = None) -> tuple[Ratio, bool]:
    """Scaling of any other operation: it may read neither sums nor what scales with the batch."""
    roles = _chosen(step, operands)
    if any(isinstance(role, PartialSum) for role in roles):
        if any(isinstance(role, Split) for role in roles):
            raise NotSeparableError(STATISTICS)
        raise NotSeparableError(
            "is not linear in a sum or mean over the examples, so that its results for the parts "
            "do not add up"
        )
    # f(ratio * x) is no multiple of f(x).
    if not all(same(_ratio(role), ONE) for role in roles):
        raise NotSeparableError(SIZE, "size")
    return ONE, False


def _chosen(step: OpContext, operands: Sequence[int] | None) -> list[Role]:
    roles = list(step.roles) if operands is None else [step.roles[i] for i in operands]
    if any(isinstance(role, PartialExtreme) for role in roles):
        raise NotSeparableError(EXTREME)
    if any(isinstance(role, Permutation | Permuted) for role in roles):
        raise NotSeparableError(ORDERED)
    return roles


def _has_sums(roles: Sequence[Role]) -> bool:
    """True if there are partial sums, which must not meet the examples that they sum."""
    summed = any(isinstance(role, PartialSum) for role in roles)
    if summed and any(isinstance(role, Split) for role in roles):
        raise NotSeparableError(STATISTICS)
    return summed


def _ratio(role: Role) -> Ratio:
    assert isinstance(role, Replicated | Split | PartialSum), role
    return role.ratio
