"""Memory of every column, from the compiled programs of its stages."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from layerwise_jax.host.library import Library
from layerwise_jax.host.memory import (
    ColumnMemory,
    StageBytes,
    most_in_flight,
    waiting_bytes,
    walk_column,
)
from layerwise_jax.host.program import HostProgram
from layerwise_jax.host.stage_program import StageProgram
from layerwise_jax.run.wire import sum_dtype
from layerwise_jax.trace.program import nbytes


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
    return StageBytes(
        arrived=sum(nbytes(avals[x]) for x in stage.live_in),
        stash=sum(map(nbytes, functions.stash_avals)) if stage.has_backward else 0,
        cotangents=sum(nbytes(avals[x]) * len(readers) for x, readers in stage.pulled.items()),
        workspace={
            kind: _workspace(compiled, functions.stash_avals if kind == "F" else ())
            for (s, kind), compiled in library.programs.items()
            if s == stage.stage
        },
    )


def _workspace(compiled: Any, stash: Any) -> int:
    """Temporaries of a call and its results, but for those in the place of arguments or stashed."""
    sizes = compiled.memory_analysis()
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
