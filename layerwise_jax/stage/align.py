"""Alignment of stages: the computation that all stages have in common, so that it is compiled once.

Every stage is split into three parts, run in this order:

    before   ops that only this stage has (an embedding, surplus blocks); branch on the stage index
    body     the same computation in every stage; no branch
    after    last stage only: ops behind its body (a head, a loss); same branch, one tick later

With equal stages `before` and `after` are empty and the loop has no branch. With nothing in common
the body is empty and every stage is one case of the branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from layerwise_jax._jax import Literal
from layerwise_jax.stage.cut import Stage
from layerwise_jax.trace.canonical import CanonicalOps, canonicalize
from layerwise_jax.trace.layers import LayerSequence
from layerwise_jax.trace.pinned import free_ops_behind, free_producers, pinned_ops
from layerwise_jax.trace.program import BatchSlice, Op, Operand, Program, Value, evaluate


@dataclass(frozen=True, eq=False)
class StageParts:
    """One stage as (before, body, after); `shape` is the body's canonical form."""

    before: tuple[Op, ...]
    body: tuple[Op, ...]
    after: tuple[Op, ...]
    shape: CanonicalOps


class BodyFunction(Protocol):
    """The common body of all stages as a function. A kernel can replace it.

    The loop differentiates it, so a kernel that trains needs a `custom_vjp`.
    """

    def __call__(
        self,
        weights: Sequence[Any],
        reads: Sequence[Any],
        results: Sequence[int],
        rows: BatchSlice | None,
    ) -> list[Any]:
        """Run the body for one microbatch.

        Args:
          weights: the stage's weights, in the order of `CanonicalOps.weights`.
          reads: values of the microbatch, in the order of `CanonicalOps.reads`; then this stage's
            entry of every table in `Alignment.varying`.
          results: indices in `CanonicalOps.made` of the results to return.
          rows: the slice of the full batch that the microbatch is, for ops that draw at the full
            batch; None if there is no such op.
        """
        ...


@dataclass(frozen=True, eq=False)
class TracedBody:
    """The body as traced: evaluates ops.

    Attributes:
      ops: the ops of stage 0, with the literals that differ between stages replaced by values.
      weights, reads, made: the values of its arguments and results.
    """

    ops: tuple[Op, ...]
    weights: tuple[Value, ...]
    reads: tuple[Value, ...]
    made: tuple[Value, ...]

    def __call__(
        self,
        weights: Sequence[Any],
        reads: Sequence[Any],
        results: Sequence[int],
        rows: BatchSlice | None,
    ) -> list[Any]:
        known = dict(zip((*self.weights, *self.reads), (*weights, *reads), strict=True))
        return evaluate(self.ops, known, [self.made[r] for r in results], rows)


@dataclass(frozen=True, eq=False)
class Alignment:
    """All stages split alike, with one body for all of them.

    Attributes:
      parts: the parts of every stage.
      num_layers: layers in the body.
      body: the common body.
      varying: literals that differ between stages: a table [stages, ...] each.
    """

    parts: tuple[StageParts, ...]
    num_layers: int
    body: BodyFunction
    varying: tuple[np.ndarray, ...]


def align_stages(
    layers: LayerSequence,
    boundaries: Sequence[int],
    stages: Sequence[Stage],
    *,
    with_body: bool = True,
) -> Alignment:
    """Split the stages so that the common body has as many layers as possible.

    Args:
      layers: the traced layers.
      boundaries: first layer of every stage, then the number of layers.
      stages: the stages between those boundaries.
      with_body: False gives an empty body; every op is then in `before`.
    """
    aligner = _Aligner(layers, boundaries, stages)
    # The body cannot be longer than the shortest stage.
    fewest_layers = min(stop - start for start, stop in aligner.ranges)
    most = fewest_layers if with_body and len(stages) > 1 else 0
    for count in range(most, 0, -1):
        parts = aligner.split(count)
        if parts is not None:
            return _alignment(layers.program, parts, count)
    return _alignment(layers.program, aligner.split_without_body(), 0)


class _Aligner:
    """Search for a common body, by number of layers.

    Ranges of layers and of pinned ops both count from the start of the program.
    """

    def __init__(self, layers: LayerSequence, boundaries: Sequence[int], stages: Sequence[Stage]):
        self.program = layers.program
        self.stages = stages
        self.ranges = list(pairwise(boundaries))
        self.pinned = [i for layer in layers.layers for i in layer.pinned]
        # ends[i]: pinned ops before layer i
        self.ends = np.cumsum([0, *(len(layer.pinned) for layer in layers.layers)]).tolist()
        self.free = free_producers(self.program, pinned_ops(self.program))
        self.fingerprints: dict[int, Any] = {}
        # equal keys = equal computations up to names of values
        self.keys = [
            self._shape(self._ops(*self._pinned_range(i, i + 1))).key for i in range(len(layers))
        ]

    def split(self, count: int) -> list[StageParts] | None:
        """The stages with bodies of `count` layers each, or None if those bodies differ."""
        *firsts, (start, stop) = self.ranges
        # In all stages but the last, the body is at the end: nothing follows it.
        bodies = [(b - count, b) for _, b in firsts]
        if len({tuple(self.keys[a:b]) for a, b in bodies}) > 1:
            return None
        body_start, body_stop = bodies[0]
        pinned_of_firsts = [self._pinned_range(a, b) for a, b in bodies]
        final_start, final_stop = self._pinned_range(body_stop - 1, body_stop)
        # In the last stage, the body may start at any layer.
        for last in range(start, stop - count + 1):
            *before, final = range(last, last + count)
            if [self.keys[i] for i in before] != self.keys[body_start : body_stop - 1]:
                continue
            # The last layer may hold more than a block, such as a final norm: as many pinned ops
            # as a block has are the body's, the surplus belongs to `after`.
            end = min(self.ends[final] + final_stop - final_start, self.ends[final + 1])
            pinned = [*pinned_of_firsts, (self.ends[last], end)]
            shapes = [self._shape(self._ops(a, b)) for a, b in pinned]
            if len({shape.key for shape in shapes}) == 1:
                return [self._parts(s, body, shapes[s]) for s, body in enumerate(pinned)]
        return None

    def split_without_body(self) -> list[StageParts]:
        empty = self._shape(())
        return [StageParts(stage.ops, (), (), empty) for stage in self.stages]

    def _parts(self, s: int, body: tuple[int, int], shape: CanonicalOps) -> StageParts:
        start, stop = self._pinned_range(*self.ranges[s])
        made = {x for op in self.stages[s].ops for x in op.results}
        # outputs that free ops make, e.g. a decay term of the weights
        outputs = [
            x for x in self.stages[s].outputs.values() if isinstance(x, int) and x in self.free
        ]
        assert all(x in made for x in outputs)
        has_after = body[1] < stop
        before = self._ops(start, body[0], () if has_after else outputs)
        after = self._ops(body[1], stop, outputs) if has_after else ()
        return StageParts(before, self._ops(*body), after, shape)

    def _pinned_range(self, start: int, stop: int) -> tuple[int, int]:
        """The range of pinned ops of layers start to stop."""
        return self.ends[start], self.ends[stop]

    def _ops(self, start: int, stop: int, outputs: Sequence[Operand] = ()) -> tuple[Op, ...]:
        """Pinned ops start to stop, with the free ops that they (or `outputs`) read."""
        pinned = self.pinned[start:stop]
        reads = [x for i in pinned for x in self.program.ops[i].values]
        positions = {*pinned, *free_ops_behind(self.program, [*reads, *outputs], self.free)}
        return tuple(self.program.ops[i] for i in sorted(positions))

    def _shape(self, ops: Sequence[Op]) -> CanonicalOps:
        return canonicalize(self.program, ops, self.fingerprints)


def _alignment(program: Program, parts: Sequence[StageParts], count: int) -> Alignment:
    """Replace the literals that differ between the bodies by values that each stage looks up."""
    literals = [part.shape.literals for part in parts]  # [stages][literals of the body]
    differing = [
        j
        for j, same in enumerate(zip(*literals, strict=True))
        if len({_literal_bytes(x) for x in same}) > 1
    ]
    # New values get numbers behind those of the program.
    varying = {j: len(program.avals) + n for n, j in enumerate(differing)}
    tables = tuple(np.stack([np.asarray(of_stage[j]) for of_stage in literals]) for j in varying)
    # Literals of `shape` are in the order in which the ops read them.
    counter = iter(range(len(literals[0])))

    def replaced(operand: Operand) -> Operand:
        return varying.get(next(counter), operand) if isinstance(operand, Literal) else operand

    ops = tuple(
        replace(op, operands=tuple(replaced(x) for x in op.operands)) for op in parts[0].body
    )
    shape = parts[0].shape
    reads = (*shape.reads, *varying.values())
    body = TracedBody(ops, tuple(shape.weights), reads, tuple(shape.made))
    return Alignment(tuple(parts), count, body, tables)


def _literal_bytes(value: Any) -> bytes:
    """A literal as bytes, so that NaN equals itself and -0.0 differs from 0.0."""
    return np.asarray(value).tobytes()
