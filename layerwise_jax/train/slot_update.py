"""Update of one slot: each leaf's part of an optimizer, vectorized over the slot's shards.

The shards of a slot mostly run one program, since they are weights at the same place of equal
layers; `vmap` over the shards runs it. Where shards differ (one weight decays, another does not),
every class runs on the whole slot, and each shard keeps its own class's result.
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
from layerwise_jax.trace.program import Op, Operand, Value, Weight
from layerwise_jax.train.leaf_program import LeafProgram, check_sliced, run_op


class Component(NamedTuple):
    """Name of one of a slot's arrays: gradients, parameters, a part of the state, or an export.

    Attributes:
      kind: "gradient", "parameter", "state" or "exported".
      ordinal: number among components of equal kind, shape and dtype.
      shape, dtype: type of one shard of state.
    """

    kind: str
    ordinal: int = 0
    shape: tuple[int, ...] = ()
    dtype: Any = None


GRADIENT = Component("gradient")
PARAMETER = Component("parameter")


@dataclass(frozen=True)
class Task:
    """Work of one shard: its weight, and the values to compute with their components."""

    weight: Weight
    wanted: tuple[tuple[Component, Operand], ...]

    @property
    def is_slice(self) -> bool:
        return self.weight.start is not None


@dataclass
class RowClass:
    """Class of a slot's shards that run the same operations.

    Attributes:
      ops: operations of the first shard of the class.
      placed: values that the operations read from the slot, with their components.
      wanted: components to compute, and their values.
      is_slice: whether the shards' weights are slices of their leaves.
      rows: numbers of the shards.
      reads: shared values that each shard reads, in the same order for all shards.
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
        """Wanted values for all shards of the slot, each [num_rows, ...].

        Entries of shards of other classes are arbitrary; `run_slot` masks them.
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
    """Sorts the shards of slots into classes that run the same operations.

    Attributes:
      program: the traced optimizer.
      names: names of all leaves.
      component_of: component of a value that a weight reads from its slot; None for other values.
      fingerprints: cache of equations' fingerprints.
    """

    program: LeafProgram
    names: Sequence[str]
    component_of: Callable[[Value, Weight], Component | None]
    fingerprints: dict[int, Hashable] = field(default_factory=dict)

    def classes(self, tasks: Sequence[Task | None]) -> list[RowClass]:
        """Classes of one slot's shards, given the task of each; None for shards without one."""
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
        """(key of the class, components that the shard reads, shared values that it reads)."""
        placed = self._placed(task, ops)
        shape = canonicalize(self.program.trace, ops, self.fingerprints, weights=placed)
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
        """Values that a shard reads from its slot, with their components."""
        mine = {x for op in ops for x in op.values} | {
            x for _, x in task.wanted if not isinstance(x, Literal)
        }
        own = [x for x in sorted(mine) if self.program.owners[x] == task.weight.leaf]
        return {
            x: component
            for x in own
            if (component := self.component_of(x, task.weight)) is not None
        }


def _plain(literal: Any) -> Hashable:
    array = np.asarray(literal)
    return str(array.dtype), array.tobytes()


def run_slot(
    slot: Slot,
    classes: Sequence[RowClass],
    arrays: Mapping[Component, Any],
    shared: Mapping[Value, Any],
) -> dict[Component, Any]:
    """Components that the shards of a slot compute, each [shards, ...].

    A shard that does not compute a component keeps its state, or gets zeros.
    """
    num_rows = len(slot.weights)
    results: dict[Component, Any] = {}
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
