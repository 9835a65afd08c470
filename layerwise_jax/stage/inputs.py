"""Inputs of a staged function: batch axes of their leaves, and checks of the full batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax

from layerwise_jax.trace.layers import Signature

# Paths that a message about two trees lists of either kind.
MOST_PATHS = 5


def input_axes(inputs: Any, in_axes: Any) -> tuple[int | None, ...]:
    """The batch axis of every leaf of `inputs`: 0, or None for a leaf that is not split.

    Args:
      inputs: a tree of arrays, or of shapes and dtypes.
      in_axes: 0 or None for all inputs, or a tree of them that is a prefix of `inputs`.

    Raises:
      ValueError: an axis other than 0 or None, or a tree that is no prefix of the inputs.
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
            f"in_axes must match the inputs' tree {jax.tree.structure(inputs)}, got {in_axes!r}. "
            "Give 0 or None for all inputs, or a tuple with one of them for each."
        ) from None
    if wrong := [axis for axis in axes if axis not in (0, None)]:
        raise ValueError(
            f"in_axes must hold 0 (split along axis 0) or None (not split), got {wrong[0]!r}. "
            "Transpose the input first."
        )
    avals = [jax.typeof(x) if not hasattr(x, "dtype") else x for x in jax.tree.leaves(inputs)]
    # A scalar has no axis to split.
    return tuple(axis if aval.shape else None for aval, axis in zip(avals, axes, strict=True))


def positional_inputs(
    fn: Callable[..., Any], inputs: tuple[Any, ...], named: Mapping[str, Any]
) -> tuple[Any, ...]:
    """All inputs of `fn(params, *inputs)` in order, some of them given by name.

    Raises:
      ValueError: `fn` has no such inputs, or one is missing or given twice.
    """
    try:
        bound = inspect.signature(fn).bind(None, *inputs, **named)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Inputs by name must be those of the function, got {', '.join(named)}: {error}. Pass "
            "them in the function's order."
        ) from None
    if bound.kwargs:
        raise ValueError(
            f"Inputs by name must be positional in the function, got {', '.join(bound.kwargs)}. "
            "Stage a function that takes them by position."
        )
    return bound.args[1:]


def batch_size(inputs: tuple[Any, ...], in_axes: Any) -> int:
    """The batch size: examples along axis 0 of the inputs that are split.

    Raises:
      ValueError: no input is split, or their leading axes differ.
    """
    sizes = sorted({leaf.shape[0] for leaf, axis in _with_axes(inputs, in_axes) if axis == 0})
    if len(sizes) != 1:
        raise ValueError(
            f"inputs that are split must have one batch size, got leading axes of {sizes}. Give "
            "None in in_axes for inputs that every microbatch reads whole."
        )
    return sizes[0]


def first_rows(inputs: tuple[Any, ...], in_axes: Any, rows: int) -> tuple[Any, ...]:
    """Shapes and dtypes of the inputs of one microbatch of `rows` examples."""
    leaves = [
        jax.ShapeDtypeStruct((rows, *leaf.shape[1:]) if axis == 0 else leaf.shape, leaf.dtype)
        for leaf, axis in _with_axes(inputs, in_axes)
    ]
    return jax.tree.unflatten(jax.tree.structure(inputs), leaves)


def check_inputs(
    inputs: tuple[Any, ...], signature: Signature, axes: tuple[int | None, ...], parts: int
) -> list[Any]:
    """Check the inputs of a full batch and return their leaves.

    Args:
      inputs: the inputs, at the full batch.
      signature: types of the inputs of one microbatch.
      axes: the batch axis of every leaf, as `input_axes` returns it.
      parts: microbatches of all replicas; the batch has `parts` times a microbatch's rows.

    Raises:
      ValueError: another tree, shape or dtype; the message names the input.
    """
    leaves, tree = jax.tree.flatten(inputs)  # None has no leaf, in both trees
    if tree != signature.inputs_tree:
        raise ValueError(
            f"inputs must have the traced tree {signature.inputs_tree}, got {tree}"
            f"{tree_difference(signature.inputs_tree, tree)}. Pass all arguments of the function "
            "but its parameters."
        )
    for j, (leaf, aval, axis) in enumerate(zip(leaves, signature.inputs_avals, axes, strict=True)):
        # aval is that of one microbatch: [rows, ...]; the batch is [parts * rows, ...]
        shape = aval.shape if axis is None else (aval.shape[0] * parts, *aval.shape[1:])
        given = jax.typeof(leaf)
        if given.shape != shape or given.dtype != aval.dtype:
            split = "" if axis is None else f" ({parts} microbatches of {aval.shape[0]})"
            raise ValueError(
                f"input {j} must be {aval.dtype}{list(shape)}{split}, got {given.dtype}"
                f"{list(given.shape)}. Pass that shape and dtype, or build a pipeline for this one."
            )
    return leaves


def tree_difference(expected: Any, given: Any) -> str:
    """The paths at which two tree structures differ, as the end of a message; at most a few."""
    names = [
        [
            jax.tree_util.keystr(path)
            for path, _ in jax.tree_util.tree_flatten_with_path(
                jax.tree.unflatten(tree, range(tree.num_leaves))
            )[0]
        ]
        for tree in (expected, given)
    ]
    missing = [name for name in names[0] if name not in set(names[1])]
    surplus = [name for name in names[1] if name not in set(names[0])]
    found = [("missing", missing), ("unexpected", surplus)]
    parts = [
        f"{what} {', '.join(paths[:MOST_PATHS])}"
        + (f" and {len(paths) - MOST_PATHS} more" if len(paths) > MOST_PATHS else "")
        for what, paths in found
        if paths
    ]
    if not parts:
        trees = [str(tree) for tree in (given, expected)]
        return " (in other containers: {:.100} in place of {:.100})".format(*trees)
    return f" ({'; '.join(parts)})"


def _with_axes(inputs: tuple[Any, ...], in_axes: Any) -> list[tuple[Any, int | None]]:
    """(input leaf as shape and dtype, its batch axis) for all leaves."""
    leaves = [x if hasattr(x, "dtype") else jax.typeof(x) for x in jax.tree.leaves(inputs)]
    return list(zip(leaves, input_axes(inputs, in_axes), strict=True))
