"""Tick loop: runs the stages of a device by a schedule, forward only or forward and backward.

Each tick a device does what its schedule's table says: forward for one microbatch, backward for
another, or both, in this order:

    forward  load what arrived, run the stage, stash for backward, send to the next device
    backward load cotangents and the stash, run the stage's VJP, send to the device before

A receiver stores a message in the tick that sends it; the tables' arrivals, which count from the
next tick, are shifted by one.

In training nothing differentiates the loop: a tick takes a stage's VJP by itself. Memory is bounded
by the stash, whatever the number of microbatches. A forward loop has no stash and can be
differentiated by `jax.grad`, with residuals of every tick.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from layerwise_jax.run.buffers import empty_buffers
from layerwise_jax.run.casts import CastProgram, take_casts_out
from layerwise_jax.run.linearize import lay_out_stash
from layerwise_jax.run.outputs import start_output
from layerwise_jax.run.residuals import StashLayout
from layerwise_jax.run.stage import LocalStage
from layerwise_jax.run.tick import Backward, Tick, TickOptions, TickRows, TickState, occurring
from layerwise_jax.run.wire import fill, sum_dtype, wire_aval
from layerwise_jax.schedule.arrays import ScheduleTables, lower_schedule
from layerwise_jax.schedule.generators import forward_only
from layerwise_jax.stage.staged_program import StagedProgram

# Ticks of one kind (only forward, both, only backward) are a loop each, up to this many loops.
MOST_PHASES = 5


@dataclass(frozen=True, eq=False)
class TickLoop:
    """The stages of a program, run by a schedule.

    Attributes:
      program: the staged program.
      tables: the schedule as arrays.
      roles: for every output, how microbatches combine: "rows", "reduced" or "whole".
      backward: options of the backward pass; None runs forward only.
    """

    program: StagedProgram
    tables: ScheduleTables
    roles: tuple[str, ...]
    backward: Backward | None = None

    @classmethod
    def forward(cls, program: StagedProgram, roles: Sequence[str]) -> TickLoop:
        """The forward loop: a device runs one stage for one microbatch a tick."""
        schedule = forward_only(program.num_devices, program.num_microbatches, program.num_chunks)
        return cls(program, lower_schedule(schedule), tuple(roles))

    def run(
        self, weights: Sequence[Any], inputs: Sequence[Any], replica: Any
    ) -> tuple[list[Any], list[Any], list[Any]]:
        """All ticks on this device.

        Args:
          weights: this device's shard of every slot, in the weight's own shape.
          inputs: every input leaf: [microbatches, rows, ...] where it is split, else whole.
          replica: int32 scalar, this device's index on the data axis.

        Returns:
          Outputs: [microbatches, ...] for role "rows", else summed or taken once; zeros on all
          devices but the one that makes them. Gradients by slot, None for untrained slots and in a
          forward loop. Slots afterwards.
        """
        casts = self._casts
        remat = None if self.backward is None else self.backward.remat
        device = LocalStage(
            casts.program,
            list(inputs),
            replica,
            gates=self.backward is None,
            recomputes_cheap=remat == "cheap",
        )
        stashes = self.backward is not None and remat != "stage"
        held = casts.cast(weights)
        layout = lay_out_stash(device, held) if stashes else None
        options = TickOptions(self.roles, self.backward, self.lags, layout)
        state = self._start(held, list(weights), layout)
        for rows in self._phases():
            state, _ = lax.scan(Tick(device, options, rows), state, rows)
        slots = [
            state.slots[j] if j in self.program.state_slots else weight
            for j, weight in enumerate(weights)
        ]
        return state.outputs, state.accumulators, slots

    @cached_property
    def _casts(self) -> CastProgram:
        """The program with weights cast before the loop.

        A forward loop casts in every tick: JAX may differentiate it, and would add up gradients of
        the cast weights over ticks in the narrow dtype.
        """
        return (
            CastProgram(self.program, {}) if self.backward is None else take_casts_out(self.program)
        )

    @property
    def lags(self) -> bool:
        """True if `after` runs a tick behind its body, so that a tick has a single branch.

        Only in a forward loop with one stage a device: elsewhere the next tick may be another
        stage's.
        """
        return (
            self.backward is None and self.program.num_chunks == 1 and self.program.wiring.lag > 0
        )

    @cached_property
    def reads_arrivals_at_once(self) -> bool:
        """True if activations need no buffer: the forward loop uses all in the tick they arrive."""
        reads = self.tables.activation_read  # [ticks, devices], -1 where nothing is read
        at_once = (reads < 0) | (reads == self.tables.activation_arrival)
        return self.backward is None and bool(np.all(at_once))

    def _start(self, held: list[Any], weights: list[Any], layout: StashLayout | None) -> TickState:
        """The state before the first tick; `held` are the weights as the ticks read them."""
        program = self.program
        empty = program.bubble_fill
        lanes = [wire_aval(lane.aval) for lane in program.wiring.lanes]
        moving = [wire_aval(lane.aval) for lane in program.wiring.lanes if lane.has_gradient]
        state_avals = [wire_aval(jax.typeof(weights[j])) for j in program.state_slots]
        trains = self.backward is not None
        # without a layout, backward runs the stage again from what arrived and the old state
        stashed = layout.avals if layout is not None else [*lanes, *state_avals] if trains else []
        tables = self.tables
        return TickState(
            arrived=[fill(aval, empty) for aval in lanes] if self.reads_arrivals_at_once else [],
            activations=[]
            if self.reads_arrivals_at_once
            else empty_buffers(lanes, tables.num_activation_slots, empty),
            gradients=empty_buffers(moving, tables.num_gradient_slots, empty) if trains else [],
            stash=empty_buffers(stashed, tables.num_stash_slots, empty),
            accumulators=[
                _accumulator(w) if trains and program.has_gradient(j) else None
                for j, w in enumerate(weights)
            ],
            slots=held,
            outputs=[start_output(program, p, role) for p, role in enumerate(self.roles)],
            kept=[fill(wire_aval(program.program.avals[x]), empty) for x, _ in program.wiring.kept]
            if self.lags
            else [],
        )

    def _phases(self) -> list[TickRows]:
        """The tables in phases: consecutive ticks in which devices do the same kinds of work."""
        tables = {
            name: table
            for name, table in vars(self.tables).items()
            if isinstance(table, np.ndarray)
        }
        if self.lags:  # one more tick, in which only `after` runs
            tables = {
                name: np.pad(table, ((0, 1), (0, 0)), constant_values=-1)
                for name, table in tables.items()
            }
            tables["late_microbatch"] = np.roll(tables["forward_microbatch"], 1, axis=0)
        for name in ("activation_arrival", "gradient_arrival"):  # of the next tick
            no_more = np.full_like(tables[name][:1], -1)
            tables[name] = np.concatenate([tables[name][1:], no_more])
        counts = self._phase_lengths(tables)
        stops = np.cumsum(counts)
        return [
            {name: table[stop - count : stop] for name, table in tables.items()}
            for count, stop in zip(counts, stops, strict=True)
        ]

    def _phase_lengths(self, tables: TickRows) -> list[int]:
        """Ticks of each phase, a loop each: in ticks without backward its code is not compiled."""
        forward, backward = tables["forward_microbatch"], tables["backward_microbatch"]
        kinds = list(zip((forward >= 0).any(axis=1), (backward >= 0).any(axis=1), strict=True))
        if self.backward is None:
            return [len(kinds)]
        splits = [_run_lengths(kinds)]  # 1F1B: F, F and B, B
        alternatives = occurring(tables["backward_chunk"], tables["backward_kind"])
        if len(alternatives) == 1 and not self.backward.skips_bubbles:
            # Idle devices compute and mask: ticks in which all go backward need no mask.
            is_full = (backward >= 0).all(axis=1)
            splits.insert(0, _run_lengths(list(zip(kinds, is_full, strict=True))))
        return next((x for x in splits if len(x) <= MOST_PHASES), [len(kinds)])


def _run_lengths(kinds: Sequence[Any]) -> list[int]:
    """Lengths of the runs of equal entries."""
    return [len(list(run)) for _, run in groupby(kinds)]


def _accumulator(weight: Any) -> Any:
    """Zeros for a weight's gradients: float32 if the weight is narrower."""
    return jnp.zeros(weight.shape, sum_dtype(weight.dtype))
