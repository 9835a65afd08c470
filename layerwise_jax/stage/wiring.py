"""Wiring of the loop: the source of every value that a stage reads, and the lanes between stages.

Values cross boundaries in lanes. A lane is one array of fixed shape; every tick moves it from some
stages to their successors, by a ppermute over just the pairs of stages that need it. A lane carries
either the same result of every sender's body, or a result of the sender's branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from layerwise_jax._jax import Literal
from layerwise_jax.schedule.table import round_robin
from layerwise_jax.stage.align import Alignment
from layerwise_jax.stage.cut import Stage
from layerwise_jax.trace.program import Op, Operand, Program, Value


@dataclass(frozen=True)
class FromInput:
    """An input of the current microbatch."""

    input: int


@dataclass(frozen=True)
class FromConstant:
    """A constant of the program."""

    value: Value


@dataclass(frozen=True)
class FromBody:
    """A result of the body."""

    result: int


@dataclass(frozen=True)
class FromBranch:
    """A result of the stage's branch."""

    result: int


@dataclass(frozen=True)
class FromLane:
    """The value received over a lane; on stage 0, which receives nothing, `first`."""

    lane: int
    first: FromInput | FromBranch


Source = FromInput | FromConstant | FromLane | FromBody | FromBranch


@dataclass(frozen=True)
class Lane:
    """An array that moves from stage s to stage s + 1.

    Attributes:
      aval: shape and dtype of the array.
      values: for every sender s in 0..k-2, the value it sends, or None where the lane is idle.
      source: the result of the body, or of the branch, that every sender sends.
    """

    aval: Any
    values: tuple[Value | None, ...]
    source: FromBody | FromBranch

    @property
    def has_gradient(self) -> bool:
        """True if a cotangent returns over the lane in the backward pass."""
        return jnp.issubdtype(self.aval.dtype, jnp.inexact)

    def pairs(self, num_devices: int) -> list[tuple[int, int]]:
        """(sender, receiver) pairs of devices for a `ppermute`; stages are assigned round-robin."""
        # a set: with several chunks, stages s and s + num_devices send between the same devices
        senders = [s for s, value in enumerate(self.values) if value is not None]
        devices = round_robin(len(self.values) + 1, num_devices)
        return sorted({(devices[s], devices[s + 1]) for s in senders})


@dataclass(frozen=True)
class Output:
    """Source of one output of the program.

    Attributes:
      stage: the stage that makes it.
      source: the result of that stage's body or branch.
      lag: ticks behind the stage's body: 1 for a result of the last stage's `after`, else 0.
    """

    stage: int
    source: FromBody | FromBranch
    lag: int


@dataclass(frozen=True, eq=False)
class Wiring:
    """The loop's wiring.

    Attributes:
      lanes: the lanes over which values cross boundaries.
      body_reads: the source of every value that the body reads.
      kept: the values that the last stage's `after` reads a tick later, and their sources.
      outputs: the source of every output of the program.
      branch_results: for every result that the branches return: its type, and each stage's value
        (None: that stage returns zeros).
    """

    lanes: tuple[Lane, ...]
    body_reads: tuple[Source, ...]
    kept: tuple[tuple[Value, FromBody | FromBranch], ...]
    outputs: tuple[Output, ...]
    branch_results: tuple[tuple[Any, tuple[Operand | None, ...]], ...]

    @property
    def body_results(self) -> tuple[int, ...]:
        """Indices of the body's results that a lane, `after` or an output uses."""
        sources = [
            *(lane.source for lane in self.lanes),
            *(s for _, s in self.kept),
            *(o.source for o in self.outputs),
        ]
        return tuple(sorted({source.result for source in sources if isinstance(source, FromBody)}))

    @property
    def needs_branch(self) -> bool:
        """True if a stage has ops outside of the common body."""
        return bool(self.branch_results)

    @property
    def lag(self) -> int:
        """Ticks between the last stage's body and the last output of a microbatch: 0 or 1."""
        return max((output.lag for output in self.outputs), default=0)


def wire(program: Program, stages: Sequence[Stage], alignment: Alignment) -> Wiring:
    """Decide lanes and sources for stages that are split by `alignment`."""
    return _Wirer(program, stages, alignment).wire()


class _Wirer:
    """Lanes and branch results so far; both only grow, and are referred to by index."""

    def __init__(self, program: Program, stages: Sequence[Stage], alignment: Alignment):
        self.program = program
        self.stages = stages
        self.parts = alignment.parts
        # value -> index among the body's results, by stage
        self.body_results = [
            {x: j for j, x in enumerate(part.shape.made)} for part in alignment.parts
        ]
        self.branch_results: list[tuple[Any, list[Operand | None]]] = []
        # (type, value by sender, result of the body or None for a result of the branch)
        self.lanes: list[tuple[Any, list[Value | None], int | None]] = []
        self.inputs = {value: j for j, value in enumerate(program.inputs)}

    def wire(self) -> Wiring:
        # Lanes first: reads of the body look up the lane over which a value arrives.
        for s, stage in enumerate(self.stages[:-1]):
            self._fill_lanes(s, stage)
        reads = tuple(
            self._body_read(values)
            for values in zip(*(p.shape.reads for p in self.parts), strict=True)
        )
        kept = tuple((x, self._on_last_stage(x)) for x in self._reads_of_after())
        outputs = tuple(self._output(position) for position in range(len(self.program.outputs)))
        lanes = tuple(self._lane(*lane) for lane in self.lanes)
        results = tuple((aval, tuple(values)) for aval, values in self.branch_results)
        return Wiring(lanes, reads, kept, outputs, results)

    def _lane(self, aval: Any, values: list[Value | None], result: int | None) -> Lane:
        # The last stage sends nothing: None behind the senders' values.
        source = self._branch_result(aval, [*values, None]) if result is None else FromBody(result)
        return Lane(aval, tuple(values), source)

    def _fill_lanes(self, s: int, stage: Stage) -> None:
        """Give every value that stage s sends a lane, the first that fits or a new one."""
        for x in stage.sends:
            aval = self.program.avals[x]
            result = self.body_results[s].get(x)
            lane = next((lane for lane in self.lanes if self._fits(lane, s, x, result)), None)
            if lane is None:  # no lane of this type and source is idle at this boundary
                idle: list[Value | None] = [None] * (len(self.stages) - 1)
                lane = (aval, idle, result)
                self.lanes.append(lane)
            lane[1][s] = x

    def _fits(
        self, lane: tuple[Any, list[Value | None], int | None], s: int, x: Value, result: int | None
    ) -> bool:
        """True if the lane has x's type and source, and is idle from stage s."""
        aval, values, carried = lane
        other = self.program.avals[x]
        same = (aval.shape, aval.dtype) == (other.shape, other.dtype)
        return same and carried == result and values[s] is None

    def _body_read(self, values: Sequence[Value]) -> Source:
        """The source of one value that all bodies read, given each stage's value.

        The same input or constant on all stages is read directly. Values that one lane brings to
        all stages but stage 0 are read from it. Anything else is a result of the branch.
        """
        first, *rest = values  # stage 0's value, those of the others
        if all(x in self.inputs for x in values) and len(set(values)) == 1:
            return FromInput(self.inputs[first])
        if all(x in self.program.constants for x in values) and self._same_constants(values):
            return FromConstant(first)
        lanes = {self._lane_into(s, x) for s, x in enumerate(rest, start=1)}
        # None: they arrive over several lanes, or one of them does not arrive
        lane = lanes.pop() if len(lanes) == 1 else None
        if lane is None:
            return self._branch_result(self.program.avals[first], list(values))
        # Stage 0 has no lane into it: an input there, or what its own segment makes.
        if first in self.inputs:
            return FromLane(lane, FromInput(self.inputs[first]))
        return FromLane(
            lane, self._branch_result(self.program.avals[first], [first, *[None] * len(rest)])
        )

    def _same_constants(self, values: Sequence[Value]) -> bool:
        arrays = [self.program.constants[x] for x in values]
        return all(
            array is arrays[0] or np.array_equal(np.asarray(array), np.asarray(arrays[0]))
            for array in arrays
        )

    def _lane_into(self, s: int, x: Value) -> int | None:
        """The lane over which x arrives at stage s, or None."""
        return next((j for j, (_, values, _) in enumerate(self.lanes) if values[s - 1] == x), None)

    def _reads_of_after(self) -> list[Value]:
        """The values of a microbatch that the last stage's `after` reads."""
        after: tuple[Op, ...] = self.parts[-1].after
        made = {x for op in after for x in op.results}
        # anything else comes from the body or the segment before it
        known = {*made, *self.program.weights, *self.program.constants, *self.program.inputs}
        return list(dict.fromkeys(x for op in after for x in op.values if x not in known))

    def _on_last_stage(self, x: Value) -> FromBody | FromBranch:
        last = len(self.stages) - 1
        if x in self.body_results[last]:
            return FromBody(self.body_results[last][x])
        return self._branch_result(self.program.avals[x], [None] * last + [x])

    def _output(self, position: int) -> Output:
        """The source of an output: its stage's body, `before` (lag 0) or `after` (lag 1)."""
        s = next(s for s, stage in enumerate(self.stages) if position in stage.outputs)
        operand = self.stages[s].outputs[position]
        if not isinstance(operand, Literal) and operand in self.body_results[s]:
            return Output(s, FromBody(self.body_results[s][operand]), 0)  # no branch needed
        lag = int(
            not isinstance(operand, Literal)
            and any(operand in op.results for op in self.parts[s].after)
        )
        aval = self.program.aval(operand)
        values: list[Operand | None] = [None] * len(self.stages)
        values[s] = operand  # other stages return zeros in its place
        return Output(s, self._branch_result(aval, values), lag)

    def _branch_result(self, aval: Any, values: Sequence[Operand | None]) -> FromBranch:
        # one a call: results are not shared between lanes and outputs; XLA merges equal ones
        self.branch_results.append((aval, list(values)))
        return FromBranch(len(self.branch_results) - 1)
