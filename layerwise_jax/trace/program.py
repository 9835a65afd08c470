"""Flat program of a traced function: a list of operations over numbered values.

A jaxpr nests layers in equations such as `jit`, `remat` and `scan`. `trace.flatten` inlines them.
The result is a `Program`: operations in trace order, each a jaxpr equation whose operands and
results are value numbers. Programs are immutable. `evaluate` binds the same primitives with the
same parameters, so it repeats the traced computation operation by operation.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from layerwise_jax._jax import (
    AbstractRef,
    JaxprEqn,
    Literal,
    avals_of,
    bind,
    is_key,
)

Value = int
Operand = int | Literal
FROM_WEIGHTS, FROM_INPUTS = 1, 2  # bits of `source_flags`


@dataclass(frozen=True, eq=False)
class Remat:
    """Mark of one `jax.checkpoint` call of the traced function.

    `evaluate` wraps the marked operations in `jax.checkpoint` again, in whichever stage they run.
    """

    policy: Any
    prevent_cse: Any


@dataclass(frozen=True)
class FullRows:
    """Full-batch form of an operation whose values depend on its shape (random bits, an iota).

    A microbatch binds `eqn`, at the full batch, and slices its own rows along `axis`. Each row then
    has the value that it has in the unstaged program.
    """

    eqn: JaxprEqn
    axis: int


@dataclass(frozen=True, eq=False)
class Op:
    """Operation of a program: one jaxpr equation with its value numbers.

    Attributes:
      eqn: the equation; its primitive and parameters are bound again when the operation runs.
      operands: a value number or a literal for each operand.
      results: the value number of each result.
      remats: the `jax.checkpoint` calls around the operation, outermost first.
      full_rows: the full-batch form, for operations whose values depend on the batch size.
    """

    eqn: JaxprEqn
    operands: tuple[Operand, ...]
    results: tuple[Value, ...]
    remats: tuple[Remat, ...] = ()
    full_rows: FullRows | None = None

    @property
    def name(self) -> str:
        return self.eqn.primitive.name

    @property
    def values(self) -> tuple[Value, ...]:
        """Value numbers among the operands; literals are left out."""
        return tuple(x for x in self.operands if not isinstance(x, Literal))


@dataclass(frozen=True)
class Weight:
    """Unit of placement: a parameter leaf, or the slices [start, stop) of its first axis.

    Slices occur where a program reads a stacked leaf layer by layer (a scan over layers, or `w[i]`
    in a Python loop). A captured weight is an array that the function closes over; its leaf numbers
    go on after those of the parameters, and it is frozen.
    """

    leaf: int
    start: int | None = None
    stop: int | None = None
    is_captured: bool = False

    def of(self, leaf: Any) -> Any:
        """This weight's part of the leaf's array: the leaf itself, or its slices."""
        return leaf if self.start is None else leaf[self.start : self.stop]


@dataclass(frozen=True)
class Program:
    """Flat function of parameters and inputs.

    Attributes:
      ops: operations in trace order.
      avals: shape and dtype of every value, indexed by value number.
      weights: weight by value number.
      inputs: value number of every input leaf.
      outputs: value number or literal of every output leaf.
      constants: arrays that the function closes over, by value number.
      captured: larger arrays that it closes over, by leaf: they are weights.
    """

    ops: tuple[Op, ...]
    avals: tuple[Any, ...]
    weights: Mapping[Value, Weight]
    inputs: tuple[Value, ...]
    outputs: tuple[Operand, ...]
    constants: Mapping[Value, Any] = field(default_factory=dict)
    captured: Mapping[int, Any] = field(default_factory=dict)

    def captured_as_constants(self, leaves: Collection[int]) -> Program:
        """The program with these captured arrays as constants instead of weights."""
        moved = {x: w for x, w in self.weights.items() if w.is_captured and w.leaf in leaves}
        constants = {x: weight.of(self.captured[weight.leaf]) for x, weight in moved.items()}
        return replace(
            self,
            weights={x: weight for x, weight in self.weights.items() if x not in moved},
            constants={**self.constants, **constants},
            captured={leaf: x for leaf, x in self.captured.items() if leaf not in leaves},
        )

    def aval(self, operand: Operand) -> Any:
        """Shape and dtype of a value or a literal."""
        return operand.aval if isinstance(operand, Literal) else self.avals[operand]

    def producers(self) -> dict[Value, int]:
        """Position in `ops` of the operation that computes each value."""
        return {value: i for i, op in enumerate(self.ops) for value in op.results}


def nbytes(aval: Any) -> int:
    """Bytes of a value of this shape and dtype; a random key has the bytes of its key data."""
    if isinstance(aval, AbstractRef):
        return nbytes(aval.inner_aval)
    if is_key(aval):
        return nbytes(
            jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(aval.shape, aval.dtype))
        )
    return int(np.prod(aval.shape, dtype=np.int64)) * np.dtype(aval.dtype).itemsize


@dataclass(frozen=True)
class BatchSlice:
    """Position of a microbatch in the full batch: part `index` of parts of equal size."""

    index: Any


def evaluate(
    ops: Sequence[Op],
    env: Mapping[Value, Any],
    wanted: Iterable[Operand],
    rows: BatchSlice | None = None,
) -> list:
    """Run `ops` in order and return the `wanted` values.

    Neighbouring operations of one `jax.checkpoint` call run under one `jax.checkpoint` again.

    Args:
      ops: operations, each after the producers of its operands.
      env: known values by value number: weights, inputs, constants.
      wanted: values to return, in order.
      rows: the microbatch that operations with a full-batch form slice; None runs `ops` as traced.
    """
    wanted = list(wanted)
    known = dict(env)
    for group, needed_later in _remat_groups(ops, wanted):
        if group[0].remats:
            _run_rematerialised(group, known, needed_later, rows)
        else:
            for op in group:
                _run(op, known, rows)
    return [_read(x, known) for x in wanted]


def _read(operand: Operand, known: Mapping[Value, Any]) -> Any:
    return operand.val if isinstance(operand, Literal) else known[operand]


def _run(op: Op, known: dict[Value, Any], rows: BatchSlice | None) -> None:
    operands = [_read(x, known) for x in op.operands]
    if op.full_rows is None or rows is None:
        results = bind(op.eqn, operands)
    else:
        size = avals_of(op.eqn.outvars)[0].shape[op.full_rows.axis]
        start = rows.index * size
        full_avals = avals_of(op.full_rows.eqn.invars)
        operands = [
            _repeat_to(x, aval.shape, start) for x, aval in zip(operands, full_avals, strict=True)
        ]
        whole = bind(op.full_rows.eqn, operands)  # [.., parts * size, ..]
        results = [lax.dynamic_slice_in_dim(x, start, size, op.full_rows.axis) for x in whole]
    known.update(zip(op.results, results, strict=True))


def _repeat_to(x: Any, shape: Sequence[int], start: Any) -> Any:
    """`x` in the full batch's shape: its rows at `start`, and at every multiple of its length.

    The rows outside [start, start + length) are never used; copies of the microbatch's own rows
    are valid arguments there.
    """
    for axis, length in enumerate(shape):
        if length != jnp.shape(x)[axis]:
            rows = (jnp.arange(length) - start) % x.shape[axis]  # [length]
            x = jnp.take(x, rows, axis)
    return x


def _remat_groups(
    ops: Sequence[Op], wanted: Sequence[Operand]
) -> list[tuple[list[Op], set[Value]]]:
    """Runs of neighbouring operations with the same outermost checkpoint.

    Each run comes with all values that later operations or `wanted` read.
    """
    groups: list[list[Op]] = []
    for op in ops:
        same = groups and groups[-1][0].remats[:1] == op.remats[:1]
        groups[-1].append(op) if same else groups.append([op])
    used = {x for x in wanted if not isinstance(x, Literal)}
    result = []
    for group in reversed(groups):
        result.append((group, set(used)))
        used.update(x for op in group for x in op.values)
    return result[::-1]


def _run_rematerialised(
    group: Sequence[Op], known: dict[Value, Any], needed: set[Value], rows: BatchSlice | None
) -> None:
    """Run a group under its outermost `jax.checkpoint`; inner checkpoints follow by recursion."""
    remat = group[0].remats[0]
    # Only values that are used after the group leave it: all others are recomputed in backward.
    inner = [Op(op.eqn, op.operands, op.results, op.remats[1:], op.full_rows) for op in group]
    made = [x for op in group for x in op.results]
    reads = list(dict.fromkeys(x for op in group for x in op.values if x not in set(made)))
    kept = [x for x in made if x in needed]
    index = jnp.int32(0) if rows is None else rows.index

    def body(index: Any, *values: Any) -> list:
        known_inside = dict(zip(reads, values, strict=True))
        return evaluate(inner, known_inside, kept, None if rows is None else BatchSlice(index))

    checkpointed = jax.checkpoint(body, policy=remat.policy, prevent_cse=remat.prevent_cse)
    known.update(zip(kept, checkpointed(index, *(known[x] for x in reads)), strict=True))


def source_flags(program: Program) -> list[int]:
    """Bit mask of every value: FROM_WEIGHTS, FROM_INPUTS, both, or 0 for constants."""
    flags = [0] * len(program.avals)
    for value, weight in program.weights.items():
        # Captured arrays do not shape layers: their operations go where the parameters put them.
        flags[value] = 0 if weight.is_captured else FROM_WEIGHTS
    for value in program.inputs:
        flags[value] = FROM_INPUTS
    for op in program.ops:
        mask = 0
        for value in op.values:
            mask |= flags[value]
        for value in op.results:
            flags[value] = mask
    return flags


def without_dead_code(ops: Sequence[Op], outputs: Sequence[Operand]) -> list[Op]:
    """Operations that an output or an effect depends on, in order."""
    used = {x for x in outputs if not isinstance(x, Literal)}
    kept = []
    for op in reversed(ops):
        if op.eqn.effects or any(x in used for x in op.results):
            used.update(op.values)
            kept.append(op)
    return kept[::-1]
