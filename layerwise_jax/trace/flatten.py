"""Flatten a jaxpr into a `Program` by inlining nested jaxprs.

Inlined: `jit` and closed calls; `jax.checkpoint`, whose operations keep a mark; and scans over
layers, that is scans whose scanned inputs are weights, iteration by iteration. Kept as one
operation: `while`, scans over data and, depending on the `FlattenPolicy`, `cond` and custom
derivative rules.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layerwise_jax import _jax
from layerwise_jax._jax import Jaxpr, JaxprEqn, Literal, ShapedArray, Tracer
from layerwise_jax.trace.flatten_policy import FOR_GRADIENTS, FlattenPolicy
from layerwise_jax.trace.primitives import CALLS, CUSTOM_RULES, REMATS
from layerwise_jax.trace.program import (
    FROM_INPUTS,
    FROM_WEIGHTS,
    Op,
    Operand,
    Program,
    Remat,
    Value,
    Weight,
    without_dead_code,
)
from layerwise_jax.trace.stacked import (
    LayerSlices,
    are_disjoint,
    gaps_between,
    leading_spans,
    take_row,
)


def flatten(
    jaxpr: Jaxpr,
    num_weight_leaves: int,
    policy: FlattenPolicy = FOR_GRADIENTS,
    captured: Collection[int] | None = None,
) -> Program:
    """Flat program of a jaxpr whose first `num_weight_leaves` inputs are parameters.

    A leaf that is read only in slices along its first axis becomes one weight per slice, so that a
    stage holds only its own slices. A leaf that any operation reads whole stays one weight.
    `captured` are the leaves of captured arrays in another trace of the function; None: by size.
    """
    unsliced: frozenset[int] = frozenset()
    while True:
        flattener = _Flattener(unsliced, policy, captured)
        program = flattener.flatten(jaxpr, num_weight_leaves)
        held: dict[int, list[Weight]] = {}
        for weight in program.weights.values():
            held.setdefault(weight.leaf, []).append(weight)
        blocked = {leaf for leaf in flattener.slices if not are_disjoint(held[leaf])}
        if not blocked:
            return program
        unsliced |= blocked


class _Flattener:
    """One pass over a jaxpr that emits operations and inlines nested jaxprs.

    Attributes:
      unsliced: leaves that must stay one weight.
      captured: leaves of captured arrays; None for those of `CAPTURED_BYTES` or more.
      slices: value of every slice (start, stop) that is read, by leaf.
      casts: the convert_element_type of every cast value; slices of a cast leaf are cast slices.
    """

    def __init__(
        self, unsliced: frozenset[int], policy: FlattenPolicy, captured: Collection[int] | None
    ):
        self.unsliced = unsliced
        self.policy = policy
        self.captured = captured
        self.arrays: dict[int, Any] = {}  # captured leaf -> array
        self.num_constants = 0
        self.inlined = CALLS if policy.is_differentiable else CALLS | CUSTOM_RULES | REMATS
        self.ops: list[Op] = []
        self.avals: list[Any] = []
        self.flags: list[int] = []
        self.constants: dict[Value, Any] = {}
        self.weights: dict[Value, Weight] = {}
        self.num_leaves = 0
        self.leaf_values: dict[int, Value] = {}
        self.slices: dict[int, dict[tuple[int, int], Value]] = {}
        self.casts: dict[Value, Op] = {}
        self.stacked = LayerSlices()

    def flatten(self, jaxpr: Jaxpr, num_weight_leaves: int) -> Program:
        values = [self.value(var.aval) for var in jaxpr.invars]
        inputs = values[num_weight_leaves:]
        self.num_leaves = num_weight_leaves
        self.leaf_values = dict(enumerate(values[:num_weight_leaves]))
        for leaf, value in self.leaf_values.items():
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
            captured=self.arrays,
        )

    def _placed_weights(self, ops: Sequence[Op], outputs: Sequence[Operand]) -> dict[Value, Weight]:
        """Weights by value: each leaf whole, or as the slices that are read and the gaps between.

        The gaps are weights too, so that the leaf can be gathered again.
        """
        placed = {}
        used = {x for op in ops for x in op.values} | {
            x for x in outputs if not isinstance(x, Literal)
        }
        for leaf, whole in self.leaf_values.items():
            spans = {
                span: value for span, value in self.slices.get(leaf, {}).items() if value in used
            }
            is_captured = leaf in self.arrays
            placed.update({x: Weight(leaf, *span, is_captured) for span, x in spans.items()})
            if whole in used or not (spans or is_captured):
                placed[whole] = Weight(leaf, is_captured=is_captured)
            elif not is_captured:
                placed.update(self._gaps(leaf, sorted(spans)))
        return placed

    def _gaps(self, leaf: int, spans: list[tuple[int, int]]) -> dict[Value, Weight]:
        holes = gaps_between(spans, self.avals[self.leaf_values[leaf]].shape[0])
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
            env.update(zip(eqn.outvars, self.inline_or_emit(eqn, operands, remats), strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def constant(self, const: Any, aval: Any) -> Value:
        if isinstance(const, Tracer):
            raise ValueError(
                f"The function must not close over a traced array, got one of type {aval}. "
                "Pass the array as a parameter or as an input."
            )
        leaf = self.num_leaves + self.num_constants
        self.num_constants += 1
        # One captured array has one value, however often it is read.
        known = [own for own, array in self.arrays.items() if array is const]
        captures = self.policy.is_weight(aval) if self.captured is None else leaf in self.captured
        if known or captures:
            return self._captured_value(known[0] if known else leaf, const, aval)
        value = self.value(aval)
        self.constants[value] = const
        return value

    def _captured_value(self, leaf: int, const: Any, aval: Any) -> Value:
        if leaf not in self.arrays:
            self.arrays[leaf], self.leaf_values[leaf] = const, self.value(aval)
            self.weights[self.leaf_values[leaf]] = Weight(leaf, is_captured=True)
        return self.leaf_values[leaf]

    def inline_or_emit(
        self, eqn: JaxprEqn, operands: list[Operand], remats: tuple[Remat, ...]
    ) -> Sequence[Operand]:
        """Values of an equation's results, after inlining it or emitting it as one operation."""
        name = eqn.primitive.name
        keeps_placement = not self.policy.inlines_placed_calls and _jax.names_devices(eqn)
        if name in self.inlined and not keeps_placement:
            return self.run(self.policy.body(eqn), operands, remats)
        if name in REMATS and not eqn.params["differentiated"]:
            remat = Remat(eqn.params["policy"], eqn.params["prevent_cse"])
            return self.run(_jax.inner_jaxpr(eqn), operands, (*remats, remat))
        if name == "cond" and self.policy.inlines_branches and not eqn.effects:
            return self._inline_branches(eqn, operands, remats)
        if name == "scan" and self._scans_layers(eqn, operands):
            return self._inline_scan(eqn, operands, remats)
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
        if not self.policy.is_differentiable:
            self.stacked.note(op)
        return list(results)

    def replay(
        self, fn: Callable, operands: Sequence[Operand], remats: tuple[Remat, ...]
    ) -> list[Operand]:
        """Emit the operations of a small JAX function applied to `operands`."""
        avals = [x.aval if isinstance(x, Literal) else self.avals[x] for x in operands]
        return self.run(jax.make_jaxpr(fn)(*avals), operands, remats)

    def _scans_layers(self, eqn: JaxprEqn, operands: list[Operand]) -> bool:
        _, _, scanned = _jax.scan_parts(eqn, operands)
        flags = [0 if isinstance(x, Literal) else self.flags[x] for x in scanned]
        return any(flag == FROM_WEIGHTS for flag in flags) and not _jax.inner_jaxpr(eqn).effects

    def _inline_scan(
        self, eqn: JaxprEqn, operands: list[Operand], remats: tuple[Remat, ...]
    ) -> list[Operand]:
        """Iterations of a scan one after the other; outputs are stacked along a new first axis."""
        consts, carry, scanned = _jax.scan_parts(eqn, operands)
        length = eqn.params["length"]
        body = _jax.inner_jaxpr(eqn)
        order = range(length - 1, -1, -1) if eqn.params["reverse"] else range(length)
        collected: dict[int, list[Operand]] = {}
        for i in order:
            rows = [self._row(x, i, remats) for x in scanned]
            results = self.run(body, [*consts, *carry, *rows], remats)
            collected[i] = results[len(carry) :]
            carry = results[: len(carry)]
        stacked = [
            self.replay(
                lambda *rows: jnp.stack(rows), [collected[i][j] for i in range(length)], remats
            )[0]
            for j in range(len(collected[0]) if length else 0)
        ]
        return [*carry, *stacked]

    def _inline_branches(
        self, eqn: JaxprEqn, operands: list[Operand], remats: tuple[Remat, ...]
    ) -> list[Operand]:
        """Results of a cond: all branches, then a selection of each result by the index."""
        index, *args = operands
        branches = eqn.params["branches"]
        if isinstance(index, Literal):
            taken = int(np.clip(int(index.val), 0, len(branches) - 1))
            return self.run(branches[taken], args, remats)
        results = [self.run(branch, args, remats) for branch in branches]

        def select(index: Any, *options: Any) -> Any:
            return jax.lax.select_n(index if len(options) > 2 else index > 0, *options)

        return [
            self.replay(select, [index, *options], remats)[0]
            for options in zip(*results, strict=True)
        ]

    def _row(self, operand: Operand, i: int, remats: tuple[Remat, ...]) -> Operand:
        """Slice i of an operand's first axis, without that axis."""
        if (rows := self.stacked.rows(operand)) is not None:
            return rows[i]
        view = self._rows_of(operand, i, i + 1)
        if view is None:  # the index is an operand, so that the iterations are the same operations
            index = Literal(np.int32(i), ShapedArray((), np.dtype(np.int32)))
            return self.replay(take_row, [operand, index], remats)[0]
        return self.replay(lambda x: jax.lax.squeeze(x, (0,)), [view], remats)[0]

    def _rows_taken(
        self, eqn: JaxprEqn, operands: list[Operand], remats: tuple[Remat, ...]
    ) -> Sequence[Operand] | None:
        """Results of an equation that slices a parameter leaf or an array stacked here; else None.

        The results are the slices' own values, so that nothing reads the whole array.
        """
        name = eqn.primitive.name
        spans = leading_spans(eqn) or []
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
        """Value of the slices [start, stop) of a parameter leaf, or of a cast of one; else None.

        A cast leaf is sliced first and cast afterwards.
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
        if weight is None or weight.leaf in self.unsliced:
            return None
        first = weight.start or 0
        return self._rows_value(weight.leaf, first + start, first + stop)

    def _rows_value(self, leaf: int, start: int, stop: int) -> Value:
        spans = self.slices.setdefault(leaf, {})
        if (start, stop) not in spans:
            aval = self.avals[self.leaf_values[leaf]]
            spans[start, stop] = self.value(
                aval.update(shape=(stop - start, *aval.shape[1:])),
                self.flags[self.leaf_values[leaf]],
            )
            self.weights[spans[start, stop]] = Weight(leaf, start, stop, leaf in self.arrays)
        return spans[start, stop]
