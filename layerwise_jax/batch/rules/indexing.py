"""Rules for operations that read or write at computed places.

The examples are found in an index operation in three ways: in a batching dimension (each example
reads its own entry), in a dimension that is indexed by the numbers of the rows (`x[jnp.arange(b),
labels]`), or in a dimension that is read whole at places which all examples share.
"""

from __future__ import annotations

from collections.abc import Sequence

from layerwise_jax.batch.lattice import (
    BatchIota,
    IndexColumns,
    NotSeparable,
    NotSeparableError,
    OpContext,
    PartialSum,
    Ratio,
    Replicated,
    Role,
    Split,
    build,
)
from layerwise_jax.batch.linearity import STATISTICS, additive, nonlinear
from layerwise_jax.batch.rules.elementwise import Rule

BY_INDEX = "reads or writes the examples at computed places of the batch"


def is_by_length(step: OpContext) -> bool:
    """True if an index counts from the end of the batch, as JAX lets a negative one do."""
    if step.name not in RULES or isinstance(step.roles[0], NotSeparable) or step.axis(0) is None:
        return False
    return any(isinstance(role, NotSeparable) and role.cause == "size" for role in step.roles[1:])


def _gather(step: OpContext) -> Role:
    numbers = step.params["dimension_numbers"]
    # Operand axes that a gathered slice keeps, in the order of offset_dims.
    window = _others(step.shape(0), (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims))
    result = step.result_shapes()[0]
    # Axes of the result: those of the index vectors, and those of the windows that are read.
    index_dims = _others(result, numbers.offset_dims)
    _check_indices(step, 1)
    ratio, summed = additive(step, [0])
    place = _place(
        step,
        indexed=numbers.start_index_map,
        batching=(numbers.operand_batching_dims, numbers.start_indices_batching_dims),
    )
    if place is None:
        return build(None, ratio, summed)
    if summed:
        raise NotSeparableError(STATISTICS)
    kind, axis = place
    if kind == "index":  # each example reads its own entries
        # Axis of the index vectors -> axis of the result: result batch dims keep their order.
        return build(index_dims[axis], ratio, summed)
    if axis not in window or _is_cut(step, axis):  # places are shared, examples are read whole
        raise NotSeparableError(BY_INDEX)
    # Rows read whole: the examples' axis is a window axis of the result.
    return build(numbers.offset_dims[window.index(axis)], ratio, summed)


def _is_cut(step: OpContext, axis: int) -> bool:
    micro, full = step.params["slice_sizes"][axis], step.full.params["slice_sizes"][axis]
    return (micro, full) != (step.shape(0)[axis], step.full_shape(0)[axis])


def _scatter(step: OpContext) -> Role:
    numbers = step.params["dimension_numbers"]
    window = _others(step.shape(0), (*numbers.inserted_window_dims, *numbers.operand_batching_dims))
    # Axes of the updates that belong to the index vectors.
    index_dims = _others(step.shape(2), numbers.update_window_dims)
    _check_indices(step, 1)
    adds = step.name in ("scatter-add", "scatter-sub")
    place = _place(
        step,
        indexed=numbers.scatter_dims_to_operand_dims,
        batching=(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims),
    )
    updates = step.axis(2)  # of the examples among the values to write
    if step.axis(0) is None:  # the array that is written has no examples
        if place is None and updates is None:
            return build(None, *_scaling(step))
        # Embedding gradient: updates [examples, d] into [vocab, d] without examples.
        return _summed_by_scatter(step, adds)
    assert place is not None
    kind, axis = place
    # The values to write must have the examples where the index or the window has them.
    if kind == "index":
        expected = index_dims[axis]
    else:
        expected = _window_dim(numbers.update_window_dims, window, axis)
    if updates != expected:
        raise NotSeparableError(BY_INDEX)
    return build(step.axis(0), *_scaling(step))


def _scaling(step: OpContext) -> tuple[Ratio, bool]:
    """Scaling of a scatter in the array and the values: additions and overwriting are linear."""
    if step.name in ("scatter", "scatter-add", "scatter-sub"):
        return additive(step, [0, 2])
    return nonlinear(step, [0, 2])


def _window_dim(update_window_dims: Sequence[int], window: Sequence[int], axis: int) -> int | None:
    return update_window_dims[window.index(axis)] if axis in window else None


def _summed_by_scatter(step: OpContext, adds: bool) -> Role:
    """Role of a scatter of the examples into an array without them: a sum, if it adds."""
    if not adds:
        raise NotSeparableError(
            "writes all examples into one array, where they overwrite one another"
        )
    updates = step.roles[2]
    assert isinstance(updates, Split | Replicated | PartialSum)
    # Each part adds its examples' updates only: the result is a sum over the parts.
    into, added = step.roles[0], PartialSum(updates.ratio)
    return build(None, *additive(step.with_roles([into, added])))


def _check_indices(step: OpContext, operand: int) -> None:
    """Refuse indices that are themselves sums, or follow the length of the batch."""
    role = step.roles[operand]
    if isinstance(role, IndexColumns):
        for column in role.columns:
            if not isinstance(column, BatchIota):
                nonlinear(step.with_roles([column]))
    elif not isinstance(role, BatchIota):
        nonlinear(step, [operand])


def _place(
    step: OpContext, indexed: Sequence[int], batching: tuple[Sequence[int], Sequence[int]]
) -> tuple[str, int] | None:
    """Place of the examples: ("index", axis of the indices) or ("window", axis of the operand)."""
    operand, indices = step.axis(0), step.axis(1)
    if operand is None:
        return None if indices is None else ("index", indices)
    # Batched gather: operand[i] is read at indices[i].
    if operand in batching[0]:  # vmap: indices and operand have the examples side by side
        partner = batching[1][list(batching[0]).index(operand)]
        if indices is not None and partner != indices:
            raise NotSeparableError(BY_INDEX)
        return "index", partner
    if operand in indexed:  # x[arange(batch), labels]
        # The examples' axis is indexed: exact only where the index is the row's own number.
        if not _counts_rows(step, operand, list(indexed).index(operand)):
            raise NotSeparableError(BY_INDEX)
        assert indices is not None
        return "index", indices
    if indices is not None:  # x[:, labels]
        raise NotSeparableError("reads every example at the places that every other one gives")
    return "window", operand


def _counts_rows(step: OpContext, axis: int, column: int) -> bool:
    """True if a column of the indices numbers the rows along the operand's axis of examples."""
    role = step.roles[1]
    if isinstance(role, IndexColumns):
        role = role.columns[column]
    return (
        isinstance(role, BatchIota) and role.offset == (0, 0) and role.length == step.shape(0)[axis]
    )


def _others(shape: Sequence[int], dims: Sequence[int]) -> list[int]:
    return [i for i in range(len(shape)) if i not in dims]


def _dynamic_slice(step: OpContext) -> Role:
    role = step.roles[0]
    places = range(1, len(step.roles))
    if any(isinstance(step.roles[i], Split) for i in places):
        raise NotSeparableError(BY_INDEX)
    nonlinear(step, places)
    axis = step.axis()
    if isinstance(role, Split) and axis is not None and _is_cut(step, axis):
        raise NotSeparableError("takes some of the examples by their place in the batch")
    return build(role.axis if isinstance(role, Split) else None, *additive(step, [0]))


def _dynamic_update_slice(step: OpContext) -> Role:
    # Operands: array, update, then one start index per axis.
    nonlinear(step, range(2, len(step.roles)))
    axis, update = step.axis(0), step.axis(1)
    if axis != update:
        raise NotSeparableError("writes some of the examples by their place in the batch")
    if axis is not None and (step.shape(0)[axis], step.full_shape(0)[axis]) != (
        step.shape(1)[axis],
        step.full_shape(1)[axis],
    ):
        raise NotSeparableError("writes some of the examples by their place in the batch")
    rows = any(step.has_rows(i) for i in (0, 1))
    return build(axis if rows else None, *additive(step, [0, 1]))


_SCATTERS = "scatter scatter-add scatter-sub scatter-mul scatter-min scatter-max".split()
RULES: dict[str, Rule] = {
    "gather": _gather,
    **dict.fromkeys(_SCATTERS, _scatter),
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
}
INDEX_OPERAND = dict.fromkeys(["gather", *_SCATTERS], 1)
"""Position of the operand with the index vectors, which may number the rows."""
