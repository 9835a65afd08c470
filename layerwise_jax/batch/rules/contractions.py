"""Rules for contractions: matrix products and convolutions."""

from __future__ import annotations

from layerwise_jax.batch.lattice import NotSeparableError, OpContext, Role, build
from layerwise_jax.batch.linearity import product
from layerwise_jax.batch.rules.elementwise import Rule

EVERY_PAIR = "combines every example with every other"


def _dot_general(step: OpContext) -> Role:
    contracting, batch = step.params["dimension_numbers"]
    places = [_place(step, side, contracting[side], batch[side]) for side in (0, 1)]
    ratio, summed = product(step)
    kinds = {kind for kind, _ in filter(None, places)}
    if "contracted" in kinds:  # [k, examples] x [examples, n]: a sum over the examples
        if places[0] != places[1]:
            raise NotSeparableError(EVERY_PAIR)
        return build(None, ratio, True)
    # Both operands have examples, along axes that dot_general does not pair.
    if places[0] and places[1] and places[0] != places[1]:
        raise NotSeparableError(EVERY_PAIR)
    if kinds == {"free"} and places[0] and places[1]:  # [examples, k] x [k, examples]
        raise NotSeparableError(EVERY_PAIR)
    axis = _result_axis(step, places[0], 0) if places[0] else _result_axis(step, places[1], 1)
    return build(axis, ratio, summed)


def _place(
    step: OpContext, side: int, contracting: tuple[int, ...], batch: tuple[int, ...]
) -> tuple[str, int] | None:
    """Place of an operand's examples: (kind of axis, position among the axes of that kind).

    The kinds are "contracted", "batch" and "free".
    """
    axis = step.axis(side)
    if axis is None:  # no examples on this side
        return None
    for kind, axes in (("contracted", contracting), ("batch", batch)):
        if axis in axes:
            return kind, tuple(axes).index(axis)
    free = [i for i in range(len(step.shape(side))) if i not in contracting and i not in batch]
    return "free", free.index(axis)


def _result_axis(step: OpContext, place: tuple[str, int] | None, side: int) -> int | None:
    """Axis of the result for a place of an operand.

    The result's axes are the batch axes, the left operand's free ones, the right operand's.
    """
    if place is None or place[0] == "batch":
        return place and place[1]
    contracting, batch = step.params["dimension_numbers"]
    # Free axes of the right operand follow all free axes of the left one.
    left_free = len(step.shape(0)) - len(contracting[0]) - len(batch[0])
    return len(batch[0]) + place[1] + (left_free if side else 0)


def _convolution(step: OpContext) -> Role:
    left, right = step.axis(0), step.axis(1)
    # Axes of each array in the order (batch or output features, features, space...).
    left_spec, right_spec, out_spec = step.params["dimension_numbers"]
    ratio, summed = product(step)
    scaled = [name for name in GROUPS if step.params[name] != step.full.params[name]]
    if scaled:
        return build(_grouped_by_example(step, scaled), ratio, summed)
    grouped = step.params["feature_group_count"] * step.params["batch_group_count"] != 1
    # Images of each example under one kernel; kernels of each example over one image.
    if left == left_spec[0] and right is None and step.params["batch_group_count"] == 1:
        return build(out_spec[0], ratio, summed)
    if right == right_spec[0] and left is None and not grouped:
        return build(out_spec[1], ratio, summed)
    # Examples as features, contracted: the gradient of a kernel.
    if left == left_spec[1] and right == right_spec[1] and not grouped:
        return build(None, ratio, True)
    if left is None and right is None:
        return build(None, ratio, summed)
    raise NotSeparableError(
        "moves its window over the examples, or groups them"
        if None in (left, right)
        else EVERY_PAIR
    )


GROUPS = ("feature_group_count", "batch_group_count")


def _grouped_by_example(step: OpContext, scaled: list[str]) -> int:
    """Axis of the examples in the result of a convolution with a group of kernels for each example.

    `vmap` over both operands puts the examples side by side: along the features (or the batch, in
    the derivative) of the left one and the output features of the right one, one group after the
    other. A part has the first groups, whole.
    """
    left_spec, right_spec, out_spec = step.params["dimension_numbers"]
    name = scaled[0]
    # [b * features] of a part in b groups, [parts * b * features] of the batch in parts * b.
    follows = step.full.params[name] == step.parts * step.params[name]
    grouped = left_spec[1] if name == "feature_group_count" else left_spec[0]
    if len(scaled) > 1 or not follows or (step.axis(0), step.axis(1)) != (grouped, right_spec[0]):
        raise NotSeparableError("groups the examples")
    return out_spec[1]


RULES: dict[str, Rule] = {"dot_general": _dot_general, "conv_general_dilated": _convolution}
