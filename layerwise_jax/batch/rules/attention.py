"""Roles through cuDNN's attention, which `jax.nn.dot_product_attention(implementation="cudnn")`
calls.

Examples are along the first axis of all operands: query, key, value, bias, lengths of queries and
of keys, then four arrays for packed sequences, empty where there are none; the gradient takes the
softmax's statistics, the result and its cotangent, too.
"""

from __future__ import annotations

from math import prod

from layerwise_jax.batch.lattice import NotSeparableError, OpContext, Ratio, Role, build
from layerwise_jax.batch.linearity import nonlinear, product
from layerwise_jax.batch.rules.elementwise import Rule

VALUE, BIAS, PACKED, COTANGENT = 2, 3, range(6, 10), 12
NUM_OPERANDS = {"dot_product_attention_fwd_wrapper": 10, "dot_product_attention_bwd_wrapper": 13}


def _forward(step: OpContext) -> list[Role]:
    axis, ratio, summed = _linear_in(step, VALUE)
    # Log-sum-exp of the scores: depends on query and key, not on the value's scale.
    statistics = [build(axis, 1.0, False)] * (len(step.micro.outvars) - 1)
    return [build(axis, ratio, summed), *statistics]


def _backward(step: OpContext) -> list[Role]:
    axis, ratio, summed = _linear_in(step, COTANGENT)
    # Bias without examples [1, heads, q, k]: the kernel sums its gradient over the part.
    if len(step.micro.outvars) > BIAS and axis is not None and step.axis(BIAS) is None:
        raise NotSeparableError("sums the gradient of a bias over the examples")
    return [build(axis, ratio, summed)] * len(step.micro.outvars)


def _linear_in(step: OpContext, operand: int) -> tuple[int | None, Ratio, bool]:
    """Axis of the examples in all results, and their scaling, which is that of one operand."""
    # Operands that are there: absent ones are empty.
    given = [i for i in range(len(step.roles)) if prod(step.shape(i))]
    if len(step.roles) != NUM_OPERANDS[step.name]:
        raise NotSeparableError(
            "changes the scores of attention by a function of its own, which is not followed"
        )
    if step.params["dropout_rate"]:
        raise NotSeparableError("draws dropout by the place of an example in the batch")
    if any(i in given for i in PACKED):
        raise NotSeparableError("packs several sequences into one example, or pages them")
    axes = {step.axis(i) for i in given if i != BIAS or step.axis(i) is not None}
    if axes - {0, None} or len(axes) > 1:
        raise NotSeparableError("attends to other examples")
    # Softmax is linear in none of the others.
    nonlinear(step, [i for i in given if i != operand])
    return axes.pop(), *product(step, (operand,))


RULES: dict[str, Rule] = {
    "dot_product_attention_fwd_wrapper": _forward,
    "dot_product_attention_bwd_wrapper": _backward,
}
