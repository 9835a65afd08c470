"""How the result of an operation scales, by whether the operation is linear in its operands.

Each function takes the operands that matter and returns (ratio, summed) for `build`, or raises
`Mixes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from layerwise_jax.batch.lattice import (
    SIZE,
    NotSeparableError,
    OpContext,
    PartialSum,
    Replicated,
    Role,
    Split,
    same,
)

STATISTICS = (
    "uses a sum or mean over the examples in the computation of each example (as batch "
    "normalisation in training does)"
)


def additive(step: OpContext, operands: Sequence[int] | None = None) -> tuple[float, bool]:
    """Of an operation that is linear in these operands together: a sum, a choice, a new shape."""
    roles = [
        role
        for role in _chosen(step, operands)
        if not (isinstance(role, Replicated) and role.is_zero)
    ]
    summed = _only_sums_or_rows(roles)
    # What each part has in full counts `parts` times in the sum of the parts.
    ratios = [
        _ratio(role) / (step.parts if summed and isinstance(role, Replicated) else 1)
        for role in roles
    ]
    if all(same(ratio, ratios[0]) for ratio in ratios):
        return (ratios[0] if ratios else 1.0), summed
    if not summed:
        raise NotSeparableError(SIZE, "size")
    if all(isinstance(role, PartialSum) for role in roles):
        raise NotSeparableError(
            "adds a mean over the examples to a sum over the examples, which combine differently"
        )
    raise NotSeparableError(
        "adds something that does not depend on the batch (weight decay, say) to a sum over "
        "examples, so that the sum "
        "over the parts would count it once a part; with a mean over examples and reduce='mean' "
        "it would be right"
    )


def product(
    step: OpContext, operands: Sequence[int] = (0, 1), inverse: bool = False
) -> tuple[float, bool]:
    """Of an operation that is linear in each operand, the others held; `inverse` where the second
    one divides.
    """
    roles = _chosen(step, operands)
    summed = _only_sums_or_rows(roles)
    if inverse and isinstance(roles[1], PartialSum):
        both = isinstance(roles[0], PartialSum)
        raise NotSeparableError(
            "divides a sum over the examples by another one (a weighted mean, say), and the "
            "ratios of the parts do not "
            "add up to the ratio of the whole; return numerator and denominator as two outputs "
            "with reduce='sum'"
            if both
            else "divides by a sum over the examples"
        )
    if sum(isinstance(role, PartialSum) for role in roles) > 1:
        raise NotSeparableError(
            "multiplies a sum over the examples by another one (as a load-balancing loss does), "
            "and the products of "
            "the parts do not add up to the product of the whole; return the factors as two outputs"
        )
    ratios = [_ratio(role) for role in roles]
    if inverse:
        return ratios[0] / ratios[1], summed
    return prod(ratios), summed


def nonlinear(step: OpContext, operands: Sequence[int] | None = None) -> tuple[float, bool]:
    """Of any other operation: it must not see sums, nor numbers that follow the length of the
    batch.
    """
    roles = _chosen(step, operands)
    if any(isinstance(role, PartialSum) for role in roles):
        if any(isinstance(role, Split) for role in roles):
            raise NotSeparableError(STATISTICS)
        raise NotSeparableError(
            "is not linear in a sum or mean over the examples, so that its results for the parts "
            "do not add up"
        )
    if not all(same(_ratio(role), 1.0) for role in roles):
        raise NotSeparableError(SIZE, "size")
    return 1.0, False


def _chosen(step: OpContext, operands: Sequence[int] | None) -> list[Role]:
    return list(step.roles) if operands is None else [step.roles[i] for i in operands]


def _only_sums_or_rows(roles: Sequence[Role]) -> bool:
    """Whether there are sums."""
    summed = any(isinstance(role, PartialSum) for role in roles)
    if summed and any(isinstance(role, Split) for role in roles):
        raise NotSeparableError(STATISTICS)
    return summed


def _ratio(role: Role) -> float:
    assert isinstance(role, Replicated | Split | PartialSum), role
    return role.ratio
