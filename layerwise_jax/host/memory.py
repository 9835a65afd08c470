"""Memory of a column: a walk over its steps with the bytes of each stage.

The walk is in plain numbers; the bytes come from the compiled programs of the stages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from layerwise_jax.host.library import Library
from layerwise_jax.host.program import HostProgram
from layerwise_jax.host.stage_program import StageProgram
from layerwise_jax.run.wire import sum_dtype
from layerwise_jax.schedule.columns import Column
from layerwise_jax.trace.program import nbytes


@dataclass(frozen=True)
class StageBytes:
    """Bytes that a stage's steps hold for one microbatch.

    Attributes:
      arrived: values from other stages, held from their arrival until backward.
      stash: state that was read, and residuals, held from forward until backward.
      cotangents: what comes back from consumers.
      operands: of deferred products, held from the input gradient until the weight gradient.
      workspace: temporaries and results of one call, by kind of step.
    """

    arrived: int
    stash: int
    cotangents: int
    operands: int
    workspace: Mapping[str, int]


@dataclass(frozen=True)
class ColumnMemory:
    """Peak bytes on each device of a column in a training step.

    Attributes:
      weights: placed parameters, those that a tied weight repeats included.
      prepared: what the prelude makes of them, and constants.
      accumulators: sums of gradients and outputs.
      held: arrived values, stashes and cotangents of the microbatches between forward and backward.
      waiting: values that have arrived early, at most.
      workspace: temporaries and results of the call at the peak.
      optimizer: state of the optimizer, 0 where none was given.
    """

    weights: int
    prepared: int
    accumulators: int
    held: int
    waiting: int
    workspace: int
    optimizer: int = 0

    @property
    def peak(self) -> int:
        return sum(vars(self).values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in vars(self).items())
        return f"{self.peak / 1e9:.2f} GB: {parts}"


def walk_column(column: Column, stages: Mapping[int, StageBytes]) -> tuple[int, int]:
    """(bytes held, bytes of workspace) at the step of a column at which their sum is largest.

    Args:
      column: the steps.
      stages: the bytes of every stage of the column.
    """
    held = 0
    peak = (0, 0)
    trains = any(step.kind != "F" for step in column)
    for step in column:
        stage = stages[step.stage]
        if step.kind == "F":
            # Forward's residuals stay until this microbatch's backward.
            held += stage.arrived + stage.stash if trains else 0
        now = stage.workspace.get(step.kind, 0)
        if step.kind in ("FB", "F"):
            # Read by this call and freed after it.
            now += stage.arrived if step.kind == "FB" or not trains else 0
        if step.kind in ("B", "I"):
            now += stage.cotangents
        peak = max(peak, (held, now), key=sum)
        if step.kind in ("B", "I"):
            # B or I takes the held arrays out of the column.
            held -= stage.arrived + stage.stash
        if step.kind in ("I", "W"):
            # Operands of deferred products live from I to W.
            held += stage.operands if step.kind == "I" else -stage.operands
    return peak


def most_in_flight(column: Column, stage: int) -> int:
    """The most microbatches of a stage between forward and backward at once; at least 1."""
    # FB holds its microbatch only during the call.
    live = most = 1 if any(step.stage == stage and step.kind == "FB" for step in column) else 0
    for step in column:
        if step.stage == stage and step.kind == "F":
            live += 1
            most = max(most, live)
        if step.stage == stage and step.kind in ("B", "I"):
            live -= 1
    return most


def waiting_bytes(
    makers: Sequence[tuple[int, int]], in_flight: Mapping[int, int], consumer: int
) -> int:
    """Bytes of values that have arrived at a stage and wait for it, at most.

    A stage that makes a value runs ahead of the consumer by no more than the microbatches that it
    has in flight itself, less those that the consumer has begun.

    Args:
      makers: (stage that makes it, bytes) of every value that the consumer reads.
      in_flight: the most microbatches in flight, by stage.
      consumer: the stage.
    """
    # Microbatches that the maker may have sent and the consumer has not begun.
    ahead = [(max(0, in_flight[maker] - in_flight[consumer]), size) for maker, size in makers]
    return sum(count * size for count, size in ahead)


def column_memory(
    program: HostProgram, library: Library, optimizer_state: Any = None
) -> list[ColumnMemory]:
    """Peak bytes on each device of every column in a training step.

    Args:
      program: stages, columns and placement.
      library: the compiled programs of a training step.
      optimizer_state: a placed state, or its types, whose bytes are to be counted.
    """
    columns = program.columns
    stages = {stage.stage: _stage_bytes(program, library, stage) for stage in program.stages}
    in_flight = {s.stage: most_in_flight(columns[s.device], s.stage) for s in program.stages}
    return [
        _column(program, column, stages, in_flight, optimizer_state)
        for column in range(len(columns))
    ]


def _column(
    program: HostProgram,
    column: int,
    stages: dict[int, StageBytes],
    in_flight: dict[int, int],
    optimizer_state: Any,
) -> ColumnMemory:
    calls, avals = program.column_calls[column].program, program.staged.program.avals
    own = [stage for stage in program.stages if stage.device == column]
    held, workspace = walk_column(program.columns[column], {s.stage: stages[s.stage] for s in own})
    # A live value has one maker and any number of readers.
    maker = {x: stage.stage for stage in program.stages for x in stage.live_out}
    sums = [program.outputs.avals[p] for p in program.column_calls[column].summed]
    slots = program.placement.of_column[column].slots
    return ColumnMemory(
        weights=sum(nbytes(slot.aval) for slot in slots),
        prepared=sum(nbytes(avals[x]) for x in (*calls.made, *calls.constants)),
        accumulators=sum(_sum_bytes(aval) for aval in [*(avals[x] for x in calls.trained), *sums]),
        held=held,
        waiting=sum(
            waiting_bytes([(maker[x], nbytes(avals[x])) for x in s.live_in], in_flight, s.stage)
            for s in own
        ),
        workspace=workspace,
        optimizer=_state_bytes(optimizer_state, [slot.name for slot in slots]),
    )


def _stage_bytes(program: HostProgram, library: Library, stage: StageProgram) -> StageBytes:
    avals = program.staged.program.avals
    functions = program.calls[stage.stage].functions
    splits = (stage.stage, "W") in library.programs
    return StageBytes(
        arrived=sum(nbytes(avals[x]) for x in stage.live_in),
        stash=sum(map(nbytes, functions.stash_avals)) if stage.has_backward else 0,
        cotangents=sum(nbytes(avals[x]) * len(readers) for x, readers in stage.pulled.items()),
        operands=sum(map(nbytes, functions.operand_avals)) if splits else 0,
        workspace={
            kind: _workspace(compiled, functions.stash_avals if kind == "F" else ())
            for (s, kind), compiled in library.programs.items()
            if s == stage.stage
        },
    )


def _workspace(compiled: Any, stash: Any) -> int:
    """Temporaries of a call and its results, but for those in the place of arguments or stashed."""
    sizes = compiled.memory_analysis()
    # Aliased results are in the donated arguments' memory.
    results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes - sum(map(nbytes, stash))
    return sizes.temp_size_in_bytes + max(0, results)


def _sum_bytes(aval: Any) -> int:
    return math.prod(aval.shape) * np.dtype(sum_dtype(aval.dtype)).itemsize


def _state_bytes(state: Any, slots: list[str]) -> int:
    """Bytes of an optimizer's state on a device of a column: its slots', and what all share."""
    if state is None:
        return 0
    arrays = [*state.shared, *(x for name in slots for x in state.placed[name])]
    return sum(nbytes(x) for x in arrays)
