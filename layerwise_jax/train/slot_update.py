"""One leaf's part of an optimiser, run once for all rows of a slot that have the same part.

The rows of a slot mostly run one program, of weights in the same place of equal layers; `vmap` over
the rows runs it. Where rows differ (one's weight decays and the other's does not), each kind is run
on the whole slot, and every row keeps the result that is its own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from layerwise_jax._jax import Literal
from layerwise_jax.stage.placement import Slot
from layerwise_jax.trace.canonical import canonicalize
from layerwise_jax.trace.program import Op, Operand, Program, Value, Weight
from layerwise_jax.train.leaf_program import LeafProgram, check_sliced, run_op


class Component(NamedTuple):
    """Which of a slot's arrays: its gradients, its parameters, one of its state, or one that is
    made to be exported.

    Attributes:
      kind: "gradient", "parameter", "state" or "exported".
      ordinal: tells components of one kind apart; for state, it counts those of equal shape and
        dtype.
      shape, dtype: the type of a row of state.
    """

    kind: str
    ordinal: int = 0
    shape: tuple[int, ...] = ()
    dtype: Any = None


GRADIENT = Component("gradient")
PARAMETER = Component("parameter")


@dataclass(frozen=True)
class Task:
    """What the weight of one row computes: the wanted values of its leaf, each with the component
    it becomes.
    """

    weight: Weight
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
      is_slice: whether the rows' weights are slices of their leaves.
      rows: the rows.
      reads: for every row, the shared values that it reads, in one order.
    """

    ops: Sequence[Op]
    placed: Mapping[Value, Component]
    wanted: tuple[tuple[Component, Operand], ...]
    is_slice: bool
    rows: list[int] = field(default_factory=list)
    reads: list[tuple[Value, ...]] = field(default_factory=list)

    def run(
        self, arrays: Mapping[Component, Any], shared: Mapping[Value, Any], num_rows: int
    ) -> list[Any]:
        """The wanted values for all rows of the slot; those of rows of other classes mean
        nothing.
        """
        placed = [arrays[component] for component in self.placed.values()]
        columns = list(zip(*self.reads, strict=True))
        same = [len(set(column)) == 1 for column in columns]
        reads = [
            shared[column[0]] if alike else self._by_row([shared[x] for x in column], num_rows)
            for alike, column in zip(same, columns, strict=True)
        ]
        length = arrays[PARAMETER].shape[1] if self.is_slice else None
        axes = ([0] * len(placed), [None if alike else 0 for alike in same])
        return jax.vmap(partial(self._run_row, length), in_axes=axes, axis_size=num_rows)(
            placed, reads
        )

    def _by_row(self, values: Sequence[Any], num_rows: int) -> Any:
        by_row = [values[0]] * num_rows
        for row, value in zip(self.rows, values, strict=True):
            by_row[row] = value
        return jnp.stack(by_row)

    def _run_row(
        self, length: int | None, placed: Sequence[Any], reads: Sequence[Any]
    ) -> list[Any]:
        known = dict(zip(self.placed, placed, strict=True)) | dict(
            zip(self.reads[0], reads, strict=True)
        )

        def read(x: Operand) -> Any:
            return x.val if isinstance(x, Literal) else known[x]

        for op in self.ops:
            known.update(
                zip(op.results, run_op(op, [read(x) for x in op.operands], length), strict=True)
            )
        return [jnp.asarray(read(x)) for _, x in self.wanted]


@dataclass
class Classifier:
    """Sorts the rows of slots by what they run.

    Attributes:
      program: the traced optimiser.
      names: the names of all leaves.
      component_of: the component of an input that a weight's leaf owns; None for other values.
      fingerprints: a memory of equations' fingerprints.
    """

    program: LeafProgram
    names: Sequence[str]
    component_of: Callable[[Value, Weight], Component | None]
    fingerprints: dict[int, Hashable] = field(default_factory=dict)

    def classes(self, tasks: Sequence[Task | None]) -> list[RowClass]:
        """The rows of one slot, given what each computes; None for rows that compute nothing."""
        classes: dict[Hashable, RowClass] = {}
        for row, task in enumerate(tasks):
            if task is None:
                continue
            ops = self.program.ops_for(task.weight.leaf, [x for _, x in task.wanted])
            if task.is_slice:
                check_sliced(ops, self.names[task.weight.leaf])
            key, placed, reads = self._describe(task, ops)
            rows = classes.setdefault(key, RowClass(ops, placed, task.wanted, task.is_slice))
            rows.rows.append(row)
            rows.reads.append(reads)
        return list(classes.values())

    def _describe(
        self, task: Task, ops: Sequence[Op]
    ) -> tuple[Hashable, dict[Value, Component], tuple[Value, ...]]:
        """(what equal rows share, the components that the row reads, the shared values that it
        reads).
        """
        placed = self._placed(task, ops)
        shape = canonicalize(_as_program(self.program, placed), ops, self.fingerprints)
        wanted = [x for _, x in task.wanted if not isinstance(x, Literal)]
        inside = {*shape.made, *placed}
        reads = tuple(dict.fromkeys((*shape.reads, *(x for x in wanted if x not in inside))))
        own = tuple(dict.fromkeys((*shape.weights, *placed)))
        numbers = {x: n for n, x in enumerate((*own, *reads, *shape.made))}
        results = tuple(
            (c, _plain(x.val) if isinstance(x, Literal) else numbers[x]) for c, x in task.wanted
        )
        literals = tuple(_plain(x) for x in shape.literals)
        key = shape.key, literals, tuple(placed[x] for x in own), len(reads), results, task.is_slice
        return key, {x: placed[x] for x in own}, reads

    def _placed(self, task: Task, ops: Sequence[Op]) -> dict[Value, Component]:
        """The values that a row reads from its slot, with their components."""
        mine = {x for op in ops for x in op.values} | {
            x for _, x in task.wanted if not isinstance(x, Literal)
        }
        own = [x for x in sorted(mine) if self.program.owners[x] == task.weight.leaf]
        return {
            x: component
            for x in own
            if (component := self.component_of(x, task.weight)) is not None
        }


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
    """All components that the rows of a slot make; rows that do not make one keep what is there, or
    get zero.
    """
    num_rows, results = len(slot.weights), dict[Component, Any]()
    for rows in classes:
        for (component, _), array in zip(
            rows.wanted, rows.run(arrays, shared, num_rows), strict=True
        ):
            if len(rows.rows) == num_rows:
                results[component] = array
                continue
            rest = results.get(
                component, arrays.get(component) if component.kind == "state" else None
            )
            rest = jnp.zeros_like(array) if rest is None else rest
            mine = np.isin(np.arange(num_rows), rows.rows).reshape(-1, *[1] * (array.ndim - 1))
            results[component] = jnp.where(mine, array, rest)
    return results
