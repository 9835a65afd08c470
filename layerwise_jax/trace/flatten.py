"""Open a jaxpr into a flat `Program`.

Opened: `jit` and closed calls; `jax.checkpoint` (its operations keep the mark, and are wrapped
  again when they run);
a `scan` over layers, that is a scan whose scanned inputs are parameters, one iteration a time.
Never opened: `cond`, `while`, scans over data, and, where gradients may be taken, `custom_jvp` and
`custom_vjp` (that would change them).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layerwise_jax import _jax
from layerwise_jax._jax import Jaxpr, JaxprEqn, Literal, ShapedArray, Tracer
from layerwise_jax.trace.primitives import CALLS, CUSTOM_RULES, REMATS
from layerwise_jax.trace.program import Op, Operand, Program, Remat, Value, Weight
from layerwise_jax.trace.stacked import LayerSlices, leading_spans

FROM_WEIGHTS, FROM_INPUTS = 1, 2


def flatten(jaxpr: Jaxpr, num_weight_leaves: int, *, is_differentiable: bool = True) -> Program:
    """The flat program of a jaxpr whose first `num_weight_leaves` inputs are parameters.

    A leaf that is used only in slices along its first axis becomes one weight a slice, so that a
    stage need not hold the others; a leaf that is used whole anywhere stays whole. Without
    `is_differentiable` the derivative rules of custom functions are dropped, and these opened too.
    """
    sliceable = frozenset(range(num_weight_leaves))
    while True:
        flattener = _Flattener(sliceable, is_differentiable)
        program = flattener.flatten(jaxpr, num_weight_leaves)
        held: dict[int, list[Weight]] = {}
        for weight in program.weights.values():
            held.setdefault(weight.leaf, []).append(weight)
        blocked = {leaf for leaf in flattener.slices if not _are_disjoint(held[leaf])}
        if not blocked:
            return program
        sliceable -= blocked


def source_flags(program: Program) -> list[int]:
    """For each value: does it come from weights, from inputs, or both (a bit mask)."""
    flags = [0] * len(program.avals)
    for value in program.weights:
        flags[value] = FROM_WEIGHTS
    for value in program.inputs:
        flags[value] = FROM_INPUTS
    for op in program.ops:
        mask = 0
        for value in op.values:
            mask |= flags[value]
        for value in op.results:
            flags[value] = mask
    return flags


def _are_disjoint(weights: Sequence[Weight]) -> bool:
    """Whether no row of a leaf is in two of its weights."""
    in_order = sorted(weights, key=lambda weight: weight.start or 0)
    return all(a.stop is not None and a.stop <= (b.start or 0) for a, b in pairwise(in_order))


class _Flattener:
    """Walks a jaxpr once: env, read, write, one loop."""

    def __init__(self, sliceable: frozenset[int], is_differentiable: bool):
        self.sliceable = sliceable
        self.is_differentiable = is_differentiable
        self.opened = CALLS | (frozenset() if is_differentiable else CUSTOM_RULES)
        self.ops: list[Op] = []
        self.avals: list[Any] = []
        self.flags: list[int] = []
        self.constants: dict[Value, Any] = {}
        self.weights: dict[Value, Weight] = {}
        self.leaf_values: list[Value] = []
        self.slices: dict[int, dict[tuple[int, int], Value]] = {}
        self.casts: dict[Value, Op] = {}
        self.stacked = LayerSlices()

    def flatten(self, jaxpr: Jaxpr, num_weight_leaves: int) -> Program:
        values = [self.value(var.aval) for var in jaxpr.invars]
        self.leaf_values, inputs = values[:num_weight_leaves], values[num_weight_leaves:]
        for leaf, value in enumerate(self.leaf_values):
            self.weights[value] = Weight(leaf)
            self.flags[value] = FROM_WEIGHTS
        for value in inputs:
            self.flags[value] = FROM_INPUTS
        outputs = self.run(jaxpr, values, ())
        ops = without_dead_code(self.ops, outputs)
        weights = self._placed_weights(ops, outputs)
        return Program(
            ops=tuple(ops),
            avals=tuple(self.avals),
            weights=weights,
            inputs=tuple(inputs),
            outputs=tuple(outputs),
            constants=self.constants,
        )

    def _placed_weights(self, ops: Sequence[Op], outputs: Sequence[Operand]) -> dict[Value, Weight]:
        """Every leaf whole, or in the slices that are used and those between them, so that it can
        be put together.
        """
        placed = {}
        used = {x for op in ops for x in op.values} | {
            x for x in outputs if not isinstance(x, Literal)
        }
        for leaf, whole in enumerate(self.leaf_values):
            spans = {
                span: value for span, value in self.slices.get(leaf, {}).items() if value in used
            }
            placed.update({value: Weight(leaf, *span) for span, value in spans.items()})
            if whole in used or not spans:
                placed[whole] = Weight(leaf)
            else:
                placed.update(self._gaps(leaf, sorted(spans)))
        return placed

    def _gaps(self, leaf: int, spans: list[tuple[int, int]]) -> dict[Value, Weight]:
        length = self.avals[self.leaf_values[leaf]].shape[0]
        stops, starts = [0] + [stop for _, stop in spans], [start for start, _ in spans] + [length]
        holes = [(stop, start) for stop, start in zip(stops, starts, strict=True) if stop < start]
        return {self._rows_value(leaf, *hole): Weight(leaf, *hole) for hole in holes}

    def value(self, aval: Any, flags: int = 0) -> Value:
        self.avals.append(aval)
        self.flags.append(flags)
        return len(self.avals) - 1

    def run(
        self, jaxpr: Jaxpr, args: Sequence[Operand], remats: tuple[Remat, ...]
    ) -> list[Operand]:
        env: dict[Any, Operand] = {}
        for var, const in zip(jaxpr.constvars, jaxpr.consts, strict=True):
            env[var] = self.constant(const, var.aval)
        env.update(zip(jaxpr.invars, args, strict=True))

        def read(atom: Any) -> Operand:
            return atom if isinstance(atom, Literal) else env[atom]

        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            env.update(zip(eqn.outvars, self.open(eqn, operands, remats), strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def constant(self, const: Any, aval: Any) -> Value:
        if isinstance(const, Tracer):
            raise ValueError(
                f"The function closes over a traced array ({aval}); a stage's program must know "
                "all that it reads. "
                "Pass that array as a parameter or as an input."
            )
        value = self.value(aval)
        self.constants[value] = const
        return value

    def open(
        self, eqn: JaxprEqn, operands: list[Operand], remats: tuple[Remat, ...]
    ) -> Sequence[Operand]:
        """The values of an equation's results: by opening it, or by one operation of the
        program.
        """
        name = eqn.primitive.name
        if name in self.opened and not _names_devices(eqn):
            return self.run(_jax.inner_jaxpr(eqn), operands, remats)
        if name in REMATS and not eqn.params["differentiated"]:
            remat = Remat(eqn.params["policy"], eqn.params["prevent_cse"])
            return self.run(_jax.inner_jaxpr(eqn), operands, (*remats, remat))
        if name == "scan" and self._scans_layers(eqn, operands):
            return self._open_scan(eqn, operands, remats)
        rows = self._rows_taken(eqn, operands, remats)
        return self.emit(eqn, operands, remats) if rows is None else rows

    def emit(
        self, eqn: JaxprEqn, operands: Sequence[Operand], remats: tuple[Remat, ...]
    ) -> list[Value]:
        flags = 0
        for operand in operands:
            flags |= 0 if isinstance(operand, Literal) else self.flags[operand]
        results = tuple(self.value(var.aval, flags) for var in eqn.outvars)
        op = Op(eqn, tuple(operands), results, remats)
        self.ops.append(op)
        if op.name == "convert_element_type":
            self.casts[results[0]] = op
        if not self.is_differentiable:
            self.stacked.note(op)
        return list(results)

    def replay(
        self, fn: Callable, operands: Sequence[Operand], remats: tuple[Remat, ...]
    ) -> list[Operand]:
        """Add the operations of a small function of our own, applied to `operands`."""
        avals = [x.aval if isinstance(x, Literal) else self.avals[x] for x in operands]
        return self.run(jax.make_jaxpr(fn)(*avals), operands, remats)

    def _scans_layers(self, eqn: JaxprEqn, operands: list[Operand]) -> bool:
        _, _, scanned = _jax.scan_parts(eqn, operands)
        flags = [0 if isinstance(x, Literal) else self.flags[x] for x in scanned]
        return any(flag == FROM_WEIGHTS for flag in flags) and not _jax.inner_jaxpr(eqn).effects

    def _open_scan(
        self, eqn: JaxprEqn, operands: list[Operand], remats: tuple[Remat, ...]
    ) -> list[Operand]:
        consts, carry, scanned = _jax.scan_parts(eqn, operands)
        length, body = eqn.params["length"], _jax.inner_jaxpr(eqn)
        order = range(length - 1, -1, -1) if eqn.params["reverse"] else range(length)
        collected: dict[int, list[Operand]] = {}
        for i in order:
            rows = [self._row(x, i, remats) for x in scanned]
            results = self.run(body, [*consts, *carry, *rows], remats)
            carry, collected[i] = results[: len(carry)], results[len(carry) :]
        stacked = [
            self.replay(
                lambda *rows: jnp.stack(rows), [collected[i][j] for i in range(length)], remats
            )[0]
            for j in range(len(collected[0]) if length else 0)
        ]
        return [*carry, *stacked]

    def _row(self, operand: Operand, i: int, remats: tuple[Remat, ...]) -> Operand:
        if (rows := self.stacked.rows(operand)) is not None:
            return rows[i]
        view = self._rows_of(operand, i, i + 1)
        if view is None:  # the index is an operand, so that the iterations are the same operations
            index = Literal(np.int32(i), ShapedArray((), np.dtype(np.int32)))
            return self.replay(_take, [operand, index], remats)[0]
        return self.replay(lambda x: jax.lax.squeeze(x, (0,)), [view], remats)[0]

    def _rows_taken(
        self, eqn: JaxprEqn, operands: list[Operand], remats: tuple[Remat, ...]
    ) -> Sequence[Operand] | None:
        """Rows of a parameter leaf, or of what was stacked, where an equation takes such; None
        where it does not.
        """
        name, spans = eqn.primitive.name, leading_spans(eqn) or []
        if name == "squeeze" and eqn.params["dimensions"] == (0,):
            row = self.stacked.row_in(operands[0])
            return None if row is None else [row]
        if name == "unstack" and spans:
            is_known = (
                self.stacked.rows(operands[0]) is not None
                or self._rows_of(operands[0], *spans[0]) is not None
            )
            return (
                [self._row(operands[0], start, remats) for start, _ in spans] if is_known else None
            )
        views = [self._rows_of(operands[0], *span) for span in spans]
        return [view for view in views if view is not None] if views and None not in views else None

    def _rows_of(self, operand: Operand, start: int, stop: int) -> Value | None:
        """The rows of a parameter leaf, of rows of one, or of a cast of either (the cast then
        follows the slice).
        """
        if isinstance(operand, Literal):
            return None
        if operand in self.casts:
            cast = self.casts[operand]
            source = self._rows_of(cast.operands[0], start, stop)
            if source is None:
                return None
            dtype = cast.eqn.params["new_dtype"]
            return self.replay(
                lambda x: jax.lax.convert_element_type(x, dtype), [source], cast.remats
            )[0]  # type: ignore[return-value]
        weight = self.weights.get(operand)
        if weight is None or weight.leaf not in self.sliceable:
            return None
        first = weight.start or 0
        return self._rows_value(weight.leaf, first + start, first + stop)

    def _rows_value(self, leaf: int, start: int, stop: int) -> Value:
        spans = self.slices.setdefault(leaf, {})
        if (start, stop) not in spans:
            aval = self.avals[self.leaf_values[leaf]]
            spans[start, stop] = self.value(
                aval.update(shape=(stop - start, *aval.shape[1:])), FROM_WEIGHTS
            )
            self.weights[spans[start, stop]] = Weight(leaf, start, stop)
        return spans[start, stop]


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    row = jax.lax.dynamic_slice(x, (index, *[jnp.int32(0)] * (x.ndim - 1)), (1, *x.shape[1:]))
    return jax.lax.squeeze(row, (0,))


def _names_devices(eqn: JaxprEqn) -> bool:
    """Whether a nested jit fixes where its arguments or results live."""
    shardings = (*eqn.params.get("in_shardings", ()), *eqn.params.get("out_shardings", ()))
    return any(isinstance(sharding, jax.sharding.Sharding) for sharding in shardings)


def without_dead_code(ops: Sequence[Op], outputs: Sequence[Operand]) -> list[Op]:
    """Drop operations whose results nothing uses and that have no effect."""
    used = {x for x in outputs if not isinstance(x, Literal)}
    kept = []
    for op in reversed(ops):
        if op.eqn.effects or any(x in used for x in op.results):
            used.update(op.values)
            kept.append(op)
    return kept[::-1]
