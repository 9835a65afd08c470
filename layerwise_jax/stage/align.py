"""Find the layers that all stages have in common, so that they stand once in the compiled loop.

Every stage is split into three parts, run in this order:

    before   the layers only this stage has (an embedding, surplus blocks); under a branch on the
    stage index body     the same computation in every stage; no branch after    on the last stage
    only: what follows its body (a head, a loss); under the same branch, a tick later

With equal stages `before` and `after` are empty and the loop has no branch at all. With nothing in
common the body is empty and the stages stand side by side under the branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from layerwise_jax._jax import Literal
from layerwise_jax.stage.cut import Stage
from layerwise_jax.trace.canonical import CanonicalOps, canonicalize
from layerwise_jax.trace.layers import LayerSequence
from layerwise_jax.trace.pinned import free_ops_behind, free_producers, pinned_ops
from layerwise_jax.trace.program import Op, Operand, Program, Value


@dataclass(frozen=True, eq=False)
class StageParts:
    """One stage as (before, body, after); `shape` is the body's."""

    before: tuple[Op, ...]
    body: tuple[Op, ...]
    after: tuple[Op, ...]
    shape: CanonicalOps


@dataclass(frozen=True, eq=False)
class Alignment:
    """All stages, split alike.

    Attributes:
      parts: the parts of every stage.
      num_layers: how many layers the body holds.
      body: the operations that stand for every stage's body: the first stage's, with the literals
        that differ between stages replaced by values.
      varying: for each such value, its number and what it is in every stage.
    """

    parts: tuple[StageParts, ...]
    num_layers: int
    body: tuple[Op, ...]
    varying: tuple[tuple[Value, np.ndarray], ...]


def align_stages(
    layers: LayerSequence,
    boundaries: Sequence[int],
    stages: Sequence[Stage],
    *,
    with_body: bool = True,
) -> Alignment:
    """Split the stages so that the common body holds as many layers as possible, or none if not
    `with_body`.
    """
    aligner = _Aligner(layers, boundaries, stages)
    most = (
        min(stop - start for start, stop in aligner.ranges) if with_body and len(stages) > 1 else 0
    )
    for count in range(most, 0, -1):
        parts = aligner.split(count)
        if parts is not None:
            return _alignment(layers.program, parts, count)
    return _alignment(layers.program, aligner.split_without_body(), 0)


class _Aligner:
    """Tries bodies out. Ranges of layers and of anchored operations both count from the program's
    start.
    """

    def __init__(self, layers: LayerSequence, boundaries: Sequence[int], stages: Sequence[Stage]):
        self.program, self.stages = layers.program, stages
        self.ranges = list(pairwise(boundaries))
        self.anchors = [i for layer in layers.layers for i in layer.anchors]
        self.ends = np.cumsum([0, *(len(layer.anchors) for layer in layers.layers)]).tolist()
        self.free = free_producers(self.program, pinned_ops(self.program))
        self.fingerprints: dict[int, Any] = {}
        self.keys = [
            self._shape(self._ops(*self._anchors(i, i + 1))).key for i in range(len(layers))
        ]

    def split(self, count: int) -> list[StageParts] | None:
        """The stages with bodies of `count` layers each, if those are equal."""
        *firsts, (start, stop) = self.ranges
        bodies = [(b - count, b) for _, b in firsts]
        if len({tuple(self.keys[a:b]) for a, b in bodies}) > 1:
            return None
        (body_start, body_stop), anchors_of_firsts = (
            bodies[0],
            [self._anchors(a, b) for a, b in bodies],
        )
        final_start, final_stop = self._anchors(body_stop - 1, body_stop)
        for last in range(start, stop - count + 1):
            *before, final = range(last, last + count)
            if [self.keys[i] for i in before] != self.keys[body_start : body_stop - 1]:
                continue
            # What comes after the last block, such as a norm, may stand in its layer: that is left
            # to the last stage.
            end = min(self.ends[final] + final_stop - final_start, self.ends[final + 1])
            anchors = [*anchors_of_firsts, (self.ends[last], end)]
            shapes = [self._shape(self._ops(a, b)) for a, b in anchors]
            if len({shape.key for shape in shapes}) == 1:
                return [self._parts(s, body, shapes[s]) for s, body in enumerate(anchors)]
        return None

    def split_without_body(self) -> list[StageParts]:
        empty = self._shape(())
        return [StageParts(stage.ops, (), (), empty) for stage in self.stages]

    def _parts(self, s: int, body: tuple[int, int], shape: CanonicalOps) -> StageParts:
        start, stop = self._anchors(*self.ranges[s])
        made = {x for op in self.stages[s].ops for x in op.results}
        outputs = [
            x for x in self.stages[s].outputs.values() if isinstance(x, int) and x in self.free
        ]
        assert all(x in made for x in outputs)
        before = self._ops(start, body[0], () if body[1] < stop else outputs)
        after = self._ops(body[1], stop, outputs) if body[1] < stop else ()
        return StageParts(before, self._ops(*body), after, shape)

    def _anchors(self, start: int, stop: int) -> tuple[int, int]:
        """The anchored operations of layers start to stop."""
        return self.ends[start], self.ends[stop]

    def _ops(self, start: int, stop: int, outputs: Sequence[Operand] = ()) -> tuple[Op, ...]:
        """Anchored operations start to stop, with the unanchored ones that they (or `outputs`)
        need.
        """
        anchors = self.anchors[start:stop]
        reads = [x for i in anchors for x in self.program.ops[i].values]
        positions = {*anchors, *free_ops_behind(self.program, [*reads, *outputs], self.free)}
        return tuple(self.program.ops[i] for i in sorted(positions))

    def _shape(self, ops: Sequence[Op]) -> CanonicalOps:
        return canonicalize(self.program, ops, self.fingerprints)


def _alignment(program: Program, parts: Sequence[StageParts], count: int) -> Alignment:
    """Replace the literals that differ between the bodies by values that every stage looks up."""
    literals = [part.shape.literals for part in parts]
    differing = [
        j
        for j, same in enumerate(zip(*literals, strict=True))
        if len({_plain(x) for x in same}) > 1
    ]
    varying = {j: len(program.avals) + n for n, j in enumerate(differing)}
    tables = tuple(
        (value, np.stack([np.asarray(row[j]) for row in literals])) for j, value in varying.items()
    )
    counter = iter(range(len(literals[0])))

    def replaced(operand: Operand) -> Operand:
        return varying.get(next(counter), operand) if isinstance(operand, Literal) else operand

    body = tuple(
        replace(op, operands=tuple(replaced(x) for x in op.operands)) for op in parts[0].body
    )
    return Alignment(tuple(parts), count, body, tables)


def _plain(value: Any) -> bytes:
    """A literal as bytes, so that NaN equals itself and -0.0 differs from 0.0."""
    return np.asarray(value).tobytes()
