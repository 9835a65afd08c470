"""The inputs of a staged function: which are split into microbatches, and what may come in."""

from __future__ import annotations

from typing import Any

import jax

from layerwise_jax.trace.layers import Signature


def input_axes(inputs: Any, in_axes: Any) -> tuple[int | None, ...]:
    """The batch axis (0 or None) of every leaf of `inputs` (arrays, or shapes and dtypes).

    Raises:
      ValueError: an axis other than 0 or None, or axes for other inputs than there are.
    """

    def is_axis(x: Any) -> bool:
        return x is None or isinstance(x, int)

    def take(axis: int | None, part: Any) -> None:
        # An input of None has no leaves; an axis of None is one.
        axes.extend([axis] * len(jax.tree.leaves(part)))

    prefix = tuple(in_axes) if isinstance(in_axes, list) else in_axes
    axes: list[Any] = []
    try:
        jax.tree.map(take, prefix, inputs, is_leaf=is_axis)
    except ValueError:
        raise ValueError(
            f"in_axes is {in_axes!r}, which does not match inputs of the tree "
            f"{jax.tree.structure(inputs)}. "
            "Give 0 or None for all inputs, or a tuple with one of them for each."
        ) from None
    if wrong := [axis for axis in axes if axis not in (0, None)]:
        raise ValueError(
            f"in_axes has {wrong[0]!r}; inputs are split along axis 0 or not at all (None). "
            "Transpose first."
        )
    avals = [jax.typeof(x) if not hasattr(x, "dtype") else x for x in jax.tree.leaves(inputs)]
    return tuple(axis if aval.shape else None for aval, axis in zip(avals, axes, strict=True))


def batch_size(inputs: tuple[Any, ...], in_axes: Any) -> int:
    """The length of the leading axis of the inputs that are split.

    Raises:
      ValueError: none is split, or they differ.
    """
    sizes = sorted({leaf.shape[0] for leaf, axis in _with_axes(inputs, in_axes) if axis == 0})
    if len(sizes) != 1:
        raise ValueError(
            f"The inputs that are split have leading axes of {sizes}; one batch size is wanted. "
            "Name inputs that every microbatch gets whole with None in in_axes."
        )
    return sizes[0]


def first_rows(inputs: tuple[Any, ...], in_axes: Any, rows: int) -> tuple[Any, ...]:
    """The shapes of one microbatch of `rows` examples."""
    leaves = [
        jax.ShapeDtypeStruct((rows, *leaf.shape[1:]) if axis == 0 else leaf.shape, leaf.dtype)
        for leaf, axis in _with_axes(inputs, in_axes)
    ]
    return jax.tree.unflatten(jax.tree.structure(inputs), leaves)


def check_inputs(
    inputs: tuple[Any, ...], signature: Signature, axes: tuple[int | None, ...], parts: int
) -> list[Any]:
    """The leaves of the full batch, if they are what a pipeline of `parts` microbatches was built
    for.

    Raises:
      ValueError: another tree, shape or dtype; the message names the input.
    """
    leaves, tree = jax.tree.flatten(inputs)
    if tree != signature.inputs_tree:
        raise ValueError(
            f"The inputs came as {tree}, but were traced as {signature.inputs_tree}. "
            "Pass what the function takes besides its parameters."
        )
    for j, (leaf, aval, axis) in enumerate(zip(leaves, signature.inputs_avals, axes, strict=True)):
        wanted = aval.shape if axis is None else (aval.shape[0] * parts, *aval.shape[1:])
        came = jax.typeof(leaf)
        if came.shape != wanted or came.dtype != aval.dtype:
            split = "" if axis is None else f" ({parts} microbatches of {aval.shape[0]})"
            raise ValueError(
                f"Input {j} came as {came.dtype}{list(came.shape)}, but the pipeline was built "
                f"for {aval.dtype}"
                f"{list(wanted)}{split}. Pass that shape and dtype, or build a pipeline for this "
                "one."
            )
    return leaves


def _with_axes(inputs: tuple[Any, ...], in_axes: Any) -> list[tuple[Any, int | None]]:
    """(input leaf as shape and dtype, its batch axis) for all leaves."""
    leaves = [x if hasattr(x, "dtype") else jax.typeof(x) for x in jax.tree.leaves(inputs)]
    return list(zip(leaves, input_axes(inputs, in_axes), strict=True))
