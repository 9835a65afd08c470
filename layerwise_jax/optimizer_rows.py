"""One leaf's part of an optimiser, run once for all rows of a slot that have the same part.

The rows of a slot mostly run one program, of weights in the same place of equal layers; `vmap` over the rows runs it.
Where rows differ (one's weight decays and the other's does not), each kind is run on the whole slot, and every row
keeps the result that is its own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layerwise_jax._jax import Literal
from layerwise_jax.optimizer_program import LeafProgram, check_sliced, run_op
from layerwise_jax.placement import Slot
from layerwise_jax.program import Op, Operand, Program, Value, Weight
from layerwise_jax.structure import shape_of

Component = tuple[Any, ...]


@dataclass(frozen=True)
class Task:
    """What the weight of one row computes: the wanted values of its leaf, each with the component it becomes."""

    weight: Weight
    name: str
    wanted: tuple[tuple[Component, Operand], ...]

    @property
    def is_slice(self) -> bool:
        return self.weight.start is not None


@dataclass
class RowClass:
    """Rows of a slot that run the same operations.

    Attributes:
      ops: the operations of the first of the rows.
      placed: the values that the operations read from the slot, with their components.
      wanted: the components to make, and their values.
      rows: the rows.
      reads: for every row, the shared values that it reads, in one order.
      sliced_as: where weights are slices of their leaves, a component of their own shape.
    """

    ops: Sequence[Op]
    placed: Mapping[Value, Component]
    wanted: tuple[tuple[Component, Operand], ...]
    sliced_as: Component | None
    rows: list[int] = field(default_factory=list)
    reads: list[tuple[Value, ...]] = field(default_factory=list)

    def run(self, arrays: Mapping[Component, Any], shared: Mapping[Value, Any], num_rows: int) -> list[Any]:
        """The wanted values for all rows of the slot; those of rows of other classes mean nothing."""
        placed = [arrays[component] for component in self.placed.values()]
        same = [len(set(column)) == 1 for column in zip(*self.reads, strict=True)]
        reads = [
            shared[column[0]] if alike else self._by_row([shared[x] for x in column], num_rows)
            for alike, column in zip(same, zip(*self.reads, strict=True), strict=True)
        ]
        length = None if self.sliced_as is None else arrays[self.sliced_as].shape[1]
        axes = ([0] * len(placed), [None if alike else 0 for alike in same])
        return jax.vmap(partial(self._run_row, length), in_axes=axes, axis_size=num_rows)(placed, reads)

    def _by_row(self, values: Sequence[Any], num_rows: int) -> Any:
        by_row = [values[0]] * num_rows
        for row, value in zip(self.rows, values, strict=True):
            by_row[row] = value
        return jnp.stack(by_row)

    def _run_row(self, length: int | None, placed: Sequence[Any], reads: Sequence[Any]) -> list[Any]:
        known = dict(zip(self.placed, placed, strict=True)) | dict(zip(self.reads[0], reads, strict=True))

        def read(x: Operand) -> Any:
            return x.val if isinstance(x, Literal) else known[x]

        for op in self.ops:
            known.update(zip(op.results, run_op(op, [read(x) for x in op.operands], length), strict=True))
        return [jnp.asarray(read(x)) for _, x in self.wanted]


def classes_of(
    program: LeafProgram,
    tasks: Sequence[Task | None],
    component_of: Callable[[Value, Weight], Component | None],
    whole: Component,
    fingerprints: dict[int, Hashable],
) -> tuple[RowClass, ...]:
    """The rows of one slot, by what they run.

    Args:
      program: the traced optimiser.
      tasks: what each row computes; None for rows that compute nothing.
      component_of: the component of an input that a weight's leaf owns; None for other values.
      whole: a component of the weight's own shape, by which slices know how long they are.
      fingerprints: a memory of equations' fingerprints, shared between calls.
    """
    classes: dict[Hashable, RowClass] = {}
    for row, task in enumerate(tasks):
        if task is None:
            continue
        ops = program.ops_for(task.weight.leaf, [x for _, x in task.wanted])
        if task.is_slice:
            check_sliced(ops, task.name)
        key, placed, reads = _describe(program, task, ops, component_of, fingerprints)
        if key not in classes:
            classes[key] = RowClass(ops, placed, task.wanted, whole if task.is_slice else None)
        classes[key].rows.append(row)
        classes[key].reads.append(reads)
    return tuple(classes.values())


def _describe(
    program: LeafProgram,
    task: Task,
    ops: Sequence[Op],
    component_of: Callable[[Value, Weight], Component | None],
    fingerprints: dict[int, Hashable],
) -> tuple[Hashable, dict[Value, Component], tuple[Value, ...]]:
    """(what equal rows share, the components that the row reads, the shared values that it reads)."""
    mine = {x for op in ops for x in op.values} | {x for _, x in task.wanted if not isinstance(x, Literal)}
    own = [x for x in sorted(mine) if program.owners[x] == task.weight.leaf]
    placed = {x: component for x in own if (component := component_of(x, task.weight)) is not None}
    shape = shape_of(_as_program(program, placed), ops, fingerprints)
    reads = dict.fromkeys(shape.reads)
    made = {x: i for i, x in enumerate(shape.made)}

    def result(x: Operand) -> Hashable:
        if isinstance(x, Literal):
            return "literal", _plain(x.val)
        if x in made:
            return "made", made[x]
        if x in placed:
            return "placed", placed[x]
        reads.setdefault(x)
        return "read", list(reads).index(x)

    wanted = tuple((component, result(x)) for component, x in task.wanted)
    literals = tuple(_plain(x) for x in shape.literals)
    key = shape.key, literals, tuple(placed[x] for x in shape.weights), wanted, task.is_slice
    ordered = {x: placed[x] for x in (*shape.weights, *(x for x in placed if x not in shape.weights))}
    return key, ordered, tuple(reads)


def _as_program(program: LeafProgram, placed: Mapping[Value, Component]) -> Program:
    trace = program.trace
    return Program(trace.ops, trace.avals, dict.fromkeys(placed), trace.inputs, trace.outputs)  # type: ignore[arg-type]


def _plain(literal: Any) -> Hashable:
    array = np.asarray(literal)
    return str(array.dtype), array.tobytes()


def run_slot(
    slot: Slot,
    classes: Sequence[RowClass],
    arrays: Mapping[Component, Any],
    shared: Mapping[Value, Any],
) -> dict[Component, Any]:
    """All components that the rows of a slot make; rows that do not make one keep what is there, or get zero."""
    num_rows, results = len(slot.weights), dict[Component, Any]()
    for rows in classes:
        for (component, _), array in zip(rows.wanted, rows.run(arrays, shared, num_rows), strict=True):
            if len(rows.rows) == num_rows:
                results[component] = array
                continue
            rest = results.get(component, arrays.get(component) if component[0] == "state" else None)
            rest = jnp.zeros_like(array) if rest is None else rest
            mine = np.isin(np.arange(num_rows), rows.rows).reshape(-1, *[1] * (array.ndim - 1))
            results[component] = jnp.where(mine, array, rest)
    return results
