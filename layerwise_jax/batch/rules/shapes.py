"""Rules for operations that move, reshape, cut, join, reduce or order axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from math import prod
from typing import Any

from layerwise_jax.batch.lattice import (
    NotSeparableError,
    OpContext,
    PartialExtreme,
    PartialSum,
    Replicated,
    Role,
    Split,
    build,
)
from layerwise_jax.batch.linearity import additive, nonlinear
from layerwise_jax.batch.rules import extremes
from layerwise_jax.batch.rules.elementwise import Rule, common_axis


def _moved(new_axis: Callable[[OpContext, int], int]) -> Rule:
    """Rule of an operation that moves axes; `new_axis` gives the new axis of the examples."""

    def rule(step: OpContext) -> Role:
        role = step.roles[0]
        if isinstance(role, Split):
            return Split(new_axis(step, role.axis), role.ratio)
        return role

    return rule


def _broadcast_axis(step: OpContext, axis: int) -> int:
    return step.params["broadcast_dimensions"][axis]


def _transposed_axis(step: OpContext, axis: int) -> int:
    return tuple(step.params["permutation"]).index(axis)


def _squeezed_axis(step: OpContext, axis: int) -> int:
    dimensions = step.params["dimensions"]
    if axis in dimensions:
        raise NotSeparableError(
            "drops the axis of the examples, which it can only where a part is one example", "size"
        )
    return axis - sum(d < axis for d in dimensions)


def _expanded_axis(step: OpContext, axis: int) -> int:
    # Axes of the result that the operand has, in order.
    kept = [i for i in range(len(step.result_shapes()[0])) if i not in step.params["dimensions"]]
    return kept[axis]


def _reshaped_axis(step: OpContext, axis: int) -> int:
    """Axis that keeps each part's entries in one block: equally many entries precede it in both
    traces.
    """
    order = step.params.get("dimensions") or range(len(step.shape()))  # a transpose comes first
    old_micro = [step.shape()[i] for i in order]
    old_full = [step.full_shape()[i] for i in order]
    place = list(order).index(axis)
    micro, full = step.result_shapes()
    for i, (m, f) in enumerate(zip(micro, full, strict=True)):
        is_before = prod(micro[:i]) == prod(old_micro[:place]) and (
            prod(full[:i]) == prod(old_full[:place])
        )
        # Examples are outermost in the joined axis: [b, t] -> [b * t], not [t, b] -> [t * b].
        follows = f == step.parts * m
        if is_before and follows and (f != m or old_full[place] == old_micro[place]):
            return i
    raise NotSeparableError(
        "reshapes an array so that the entries of an example are no longer together"
    )


def _reshape(step: OpContext) -> Role:
    role = step.roles[0]
    if isinstance(role, Split):
        return Split(_reshaped_axis(step, role.axis), role.ratio)
    axis = step.axis()
    if not isinstance(role, Replicated) or role.fill or axis is None:
        return role
    # Constant along the axis still, unless other axes were joined to it.
    new = _reshaped_axis(step, axis)
    # [b, 1] -> [b] stays constant along the axis; [b, t] -> [b * t] has a block of t per example.
    lengths = step.shape()[axis], step.result_shapes()[0][new]
    return role if lengths[0] == lengths[1] else Split(new, role.ratio)


def _reduce_sum(step: OpContext) -> Role:
    role = step.roles[0]
    axes = step.params["axes"]
    if isinstance(role, Split):
        if role.axis in axes:
            return PartialSum(role.ratio)
        return Split(_after(role.axis, axes), role.ratio)
    ratio, summed = additive(step)
    micro, full = (prod(shape[i] for i in axes) for shape in (step.shape(), step.full_shape()))
    if micro != full and micro:
        ratio *= Fraction(full, micro)  # equal summands, as many as the batch is long
    return build(None, ratio, summed)


def _reduce(step: OpContext) -> Role:
    """Role of any other reduction of one array."""
    nonlinear(step)
    role = step.roles[0]
    axes = step.params["axes"]
    is_extreme = step.name in extremes.REDUCTIONS
    # The largest of constant rows is any of them, however many there are.
    axis = None if isinstance(role, Replicated) and is_extreme else step.axis()
    if axis is not None and axis in axes:
        if is_extreme:
            return PartialExtreme(extremes.REDUCTIONS[step.name])
        raise NotSeparableError(f"takes one result ({step.name}) over all examples")
    return Split(_after(role.axis, axes)) if isinstance(role, Split) else Replicated()


def _after(axis: int, dropped: Sequence[int]) -> int:
    return axis - sum(i < axis for i in dropped)


def _along(parameter: str, linear: bool, what: str) -> Rule:
    """Rule of an operation along one axis, example by example if it is not theirs.

    Args:
      parameter: name of the primitive's parameter with the axis.
      linear: whether the operation is linear.
      what: the operation, in words.
    """

    def rule(step: OpContext) -> list[Role]:
        along = step.params[parameter]
        along = along if isinstance(along, tuple) else (along,)  # `rev` has several
        if any(
            step.axis(i) in [a % len(step.shape(i)) for a in along] for i in range(len(step.roles))
        ):
            raise NotSeparableError(f"{what} along the axis of the examples")
        ratio, summed = additive(step) if linear else nonlinear(step)
        return [build(common_axis(step), ratio, summed)] * len(step.micro.outvars)

    return rule


def _slice(step: OpContext) -> Role:
    role = step.roles[0]
    # A slice of constant rows is one of any of them; of examples it must be all.
    if isinstance(role, Split) and not _slices_all(step, role.axis):
        raise NotSeparableError("takes some of the examples by their place in the batch")
    # x[-k:] of an axis without examples starts at the same place in both traces.
    if _starts(step.params, step.axis()) != _starts(step.full.params, step.axis()):
        raise NotSeparableError("begins at a place that depends on the length of the batch", "size")
    return build(common_axis(step), *additive(step))


def _starts(params: dict[str, Any], axis: int | None) -> list[int]:
    """Starts of a slice along all axes but that of the examples."""
    return [start for i, start in enumerate(params["start_indices"]) if i != axis]


def _slices_all(step: OpContext, axis: int) -> bool:
    result = step.result_shapes()
    return (result[0][axis], result[1][axis]) == (step.shape()[axis], step.full_shape()[axis])


def _split(step: OpContext) -> list[Role]:
    if step.axis() == step.params["axis"]:
        raise NotSeparableError("splits the examples by their place in the batch")
    return [build(common_axis(step), *additive(step))] * len(step.micro.outvars)


def _concatenate(step: OpContext) -> Role:
    dimension = step.params["dimension"]
    if any(step.axis(i) == dimension for i in range(len(step.roles))):
        raise NotSeparableError("concatenates along the axis of the examples")
    return build(common_axis(step), *additive(step))


def _stack(step: OpContext) -> Role:
    role = build(common_axis(step), *additive(step))
    if not isinstance(role, Split):
        return role
    # The new axis moves those from its place on by one.
    return Split(role.axis + (role.axis >= step.params["axis"]), role.ratio)


def _unstack(step: OpContext) -> list[Role]:
    axis = step.axis()
    if axis == step.params["axis"]:
        raise NotSeparableError("splits the examples by their place in the batch")
    role = step.roles[0]
    if isinstance(role, Split):
        role = Split(_after(role.axis, [step.params["axis"]]), role.ratio)
    return [role] * len(step.micro.outvars)


def _tile(step: OpContext) -> Role:
    micro, full = step.params["reps"], step.full.params["reps"]  # copies along each axis
    axis = step.axis()
    scaled = [i for i, (m, f) in enumerate(zip(micro, full, strict=True)) if m != f]
    role = build(common_axis(step), *additive(step))
    if axis is not None and (micro[axis], full[axis]) != (1, 1):
        raise NotSeparableError("repeats the examples")
    if not scaled:
        return role
    if len(scaled) > 1 or axis is not None or not isinstance(role, Replicated):
        raise NotSeparableError("repeats an array as often as the batch is long", "size")
    # [n] repeated for every example: one block each, constant along the axis only if n is 1.
    return role if step.shape()[scaled[0]] == 1 else Split(scaled[0], role.ratio)


def _pad(step: OpContext) -> Role:
    axis = step.axis()
    # (low, high, interior) of each axis.
    if axis is not None and any(step.params["padding_config"][axis]):
        raise NotSeparableError("pads along the axis of the examples")
    return build(common_axis(step), *additive(step))


def _window(linear: bool) -> Rule:
    """Rule of a reduction over windows, which must not reach from one example into the next."""

    def rule(step: OpContext) -> list[Role]:
        for i in range(len(step.roles)):
            # Scalars are the initial value of the reduction.
            axis = step.axis(i) if step.shape(i) else None
            if axis is not None and not _is_window_of_one(step, axis):
                raise NotSeparableError("moves a window along the axis of the examples")
        ratio, summed = additive(step) if linear else nonlinear(step)
        return [build(common_axis(step), ratio, summed)] * len(step.micro.outvars)

    return rule


def _is_window_of_one(step: OpContext, axis: int) -> bool:
    params = step.params
    # Windows of one example, one after the other; a parameter that is absent is trivial.
    plain = {
        "window_dimensions": 1,
        "window_strides": 1,
        "base_dilation": 1,
        "window_dilation": 1,
        "padding": (0, 0),
    }
    return all(params[name][axis] == want for name, want in plain.items() if params.get(name))


def _leading(*trailing: int) -> Rule:
    """Rule of a linear-algebra operation whose leading axes are a batch.

    Args:
      *trailing: for each operand, the number of last axes that it works on; the last number holds
        for all further operands.
    """

    def rule(step: OpContext) -> list[Role]:
        nonlinear(step)
        for i in range(len(step.roles)):
            axis = step.axis(i)
            # Matrices [..., n, n]: the last two axes are not a batch.
            own = trailing[min(i, len(trailing) - 1)]
            if axis is not None and axis >= len(step.shape(i)) - own:
                raise NotSeparableError("works along the axis of the examples")
        return [build(common_axis(step), 1, False)] * len(step.micro.outvars)

    return rule


def _fft(step: OpContext) -> list[Role]:
    return _leading(len(step.params["fft_lengths"]))(step)  # type: ignore[return-value]


_REDUCTIONS = (
    "reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax argmin".split()
)
_LINEAR_ALGEBRA = ("cholesky eig eigh lu qr schur svd triangular_solve").split()
RULES: dict[str, Rule] = {
    "broadcast_in_dim": _moved(_broadcast_axis),
    "transpose": _moved(_transposed_axis),
    "squeeze": _moved(_squeezed_axis),
    "expand_dims": _moved(_expanded_axis),
    "reshape": _reshape,
    "reduce_sum": _reduce_sum,
    **dict.fromkeys(_REDUCTIONS, _reduce),
    "cumsum": _along("axis", True, "sums up"),
    **dict.fromkeys(
        ("cumlogsumexp", "cummax", "cummin", "cumprod"), _along("axis", False, "accumulates")
    ),
    "rev": _along("dimensions", True, "reverses the order"),
    "sort": _along("dimension", False, "sorts"),
    "top_k": _along("axis", False, "takes the largest"),
    "approx_top_k": _along("reduction_dimension", False, "takes the largest"),
    "slice": _slice,
    "split": _split,
    "concatenate": _concatenate,
    "stack": _stack,
    "unstack": _unstack,
    "tile": _tile,
    "pad": _pad,
    "reduce_window_sum": _window(True),
    **dict.fromkeys(("reduce_window_max", "reduce_window_min", "reduce_window"), _window(False)),
    **dict.fromkeys(("select_and_scatter_add", "select_and_gather_add"), _window(False)),
    **dict.fromkeys(_LINEAR_ALGEBRA, _leading(2)),
    "householder_product": _leading(2, 1),  # matrices, scales [..., k]
    "tridiagonal_solve": _leading(1, 1, 1, 2),  # three diagonals, right-hand sides
    "fft": _fft,
}
