"""Rules for examples that are sorted, worked on one by one, and put back.

`order = argsort(key)` is a permutation of the rows that a part has, and another one of those of the
full batch. Rows in that order (`x[order]`) are no concatenation of the parts; once they are put
back (`y[argsort(order)]`) they are. Between the two, an operation must treat each row by itself.

Note [Permuted by]: `Permuted(by=Q)` is rows[Q]. Taking it at R gives rows[Q[R]], which is rows
where R is the inverse of Q.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from layerwise_jax.batch.lattice import (
    BatchIota,
    NotSeparableError,
    OpContext,
    PartialExtreme,
    PartialSum,
    Permutation,
    Permuted,
    Replicated,
    Role,
    Split,
    known,
)
from layerwise_jax.batch.linearity import ORDERED
from layerwise_jax.trace.primitives import CALL_LIKE

ByRule = Callable[[OpContext], Sequence[Role]]
"""Roles of the results by the rule of the primitive."""

# Operations through which an index stays what it is.
_MOVES = frozenset("broadcast_in_dim reshape squeeze expand_dims convert_element_type copy".split())
_SCATTERS = frozenset({"scatter", "scatter-add", "scatter_add"})


def concerns(step: OpContext) -> bool:
    """True if an operation makes or reads an order of the examples."""
    if any(isinstance(role, Permutation | Permuted) for role in step.roles):
        return True
    return step.name == "sort" and any(isinstance(role, BatchIota) for role in step.roles)


def permuted_results(step: OpContext, by_rule: ByRule) -> Sequence[Role] | None:
    """Roles of the results of an operation that makes or reads an order of the examples.

    Returns:
      None where the operation is a call, whose body is interpreted with these roles.

    Raises:
      NotSeparableError: the operation mixes the rows, or the result is in no order that is known.
    """
    if step.name in CALL_LIKE:
        return None
    if step.name == "sort":
        return _sort(step)
    if isinstance(step.roles[0], Permutation):
        return [_index_through(step)]
    if step.name == "gather" and isinstance(step.roles[1], Permutation):
        return [_gather(step, step.roles[1], by_rule)]
    if step.name in _SCATTERS and isinstance(step.roles[1], Permutation):
        return [_scatter(step, step.roles[1], by_rule)]
    return _of_each_row(step, by_rule)


def _sort(step: OpContext) -> Sequence[Role]:
    """Sort of vectors [rows]: the order from the first operand, the others taken in it."""
    key = step.roles[0]
    if len(step.shape()) != 1 or step.params["num_keys"] != 1:
        raise NotSeparableError(ORDERED)
    if isinstance(key, Permutation):
        order = key.inverse()  # argsort of a permutation
        first: Role = BatchIota(0, step.shape()[0], None)
    elif isinstance(key, Split) and key.ratio == 1:
        # Each trace sorts its own rows; the name ties uses of this order to this sort.
        order = Permutation(id(step.micro), step.shape()[0])
        first = Permuted(0, order)
    else:
        raise NotSeparableError(ORDERED)
    return [first, *(_taken(role, order) for role in step.roles[1:])]


def _taken(role: Role, order: Permutation) -> Role:
    """Role of rows taken in an order: see Note [Permuted by]."""
    if isinstance(role, BatchIota) and role.offset == (0, 0) and role.length == order.length:
        return order
    if isinstance(role, Split):
        return Permuted(role.axis, order, role.ratio)
    # x[P][P^-1] = x: back in the examples' order, so parts concatenate again.
    if isinstance(role, Permuted) and role.by == order.inverse():
        return Split(role.axis, role.ratio)
    raise NotSeparableError(ORDERED)


def _index_through(step: OpContext) -> Role:
    """Role of an index after it was moved, or shifted where it is negative (it is not)."""
    order = step.roles[0]
    assert isinstance(order, Permutation)
    other = step.roles[1] if len(step.roles) == 2 else None
    if step.name == "lt" and isinstance(other, Replicated) and other.fill == (0, 0):
        return known(False, False)
    if step.name == "add" and isinstance(other, Replicated):
        return order.shifted()  # read only where `lt` is true
    if step.name == "rev" and len(step.shape()) == 1:
        # A reversed order is another order of all rows; its inverse is not tracked to the old one.
        return Permutation(id(step.micro), order.length)
    if step.name in _MOVES and order.shift == 0:
        micro, full = step.result_shapes()
        # The rows stay the first axis, and any further ones are of length one: [rows, 1].
        if micro[0] == order.length and all(n == 1 for n in (*micro[1:], *full[1:])):
            return order
    raise NotSeparableError(ORDERED)


def _gather(step: OpContext, order: Permutation, by_rule: ByRule) -> Role:
    operand = step.roles[0]
    if order.shift or not isinstance(operand, Split | Permuted):
        raise NotSeparableError(ORDERED)
    rows = Split(operand.axis, operand.ratio)
    # The axes follow as if each row read itself; the order is added to that result.
    (result,) = by_rule(step.with_roles([rows, _as_numbers(order)]))
    if not isinstance(result, Split):
        raise NotSeparableError(ORDERED)
    return _taken(replace(operand, axis=result.axis), order)


def _scatter(step: OpContext, order: Permutation, by_rule: ByRule) -> Role:
    """Rows written at the places of an order: zeros.at[Q].set(x) is x taken in Q's inverse."""
    base, _, updates = step.roles
    if order.shift or not isinstance(updates, Split | Permuted):
        raise NotSeparableError(ORDERED)
    rows = Split(updates.axis, updates.ratio)
    (result,) = by_rule(step.with_roles([base, _as_numbers(order), rows]))
    if not isinstance(result, Split):
        raise NotSeparableError(ORDERED)
    placed = _taken(replace(updates, axis=result.axis), order.inverse())
    # Rows in two different orders would be added.
    if isinstance(base, Split) and isinstance(placed, Permuted):
        raise NotSeparableError(ORDERED)
    return placed


def _as_numbers(order: Permutation) -> BatchIota:
    """An index of every row once, for rules that know the numbering of the rows."""
    return BatchIota(0, order.length, None)


def _of_each_row(step: OpContext, by_rule: ByRule) -> Sequence[Role]:
    """Roles where all rows are in one order, and the rule treats each row by itself."""
    # x[P] + y[P] = (x + y)[P], but x[P] + y pairs rows of different examples.
    orders = {role.by for role in step.roles if isinstance(role, Permuted)}
    mixes = any(isinstance(role, Split | BatchIota | Permutation) for role in step.roles)
    if len(orders) != 1 or mixes:
        raise NotSeparableError(ORDERED)
    (order,) = orders
    roles = [
        Split(role.axis, role.ratio) if isinstance(role, Permuted) else role for role in step.roles
    ]
    results = by_rule(step.with_roles(roles))
    return [_in_order(step, i, role, order) for i, role in enumerate(results)]


def _in_order(step: OpContext, position: int, role: Role, order: Permutation) -> Role:
    # A sum or maximum over all rows does not depend on their order.
    if isinstance(role, PartialSum | PartialExtreme | Replicated):
        return role
    # A reshape that joins or splits rows would mix rows that are not of one example.
    keeps_rows = isinstance(role, Split) and (
        step.result_shapes(position)[0][role.axis] == order.length
    )
    if not keeps_rows:
        raise NotSeparableError(ORDERED)
    assert isinstance(role, Split)
    return Permuted(role.axis, order, role.ratio)
