"""Tick loop: runs the stages of a device by a schedule, forward only or forward and backward.

Each tick a device does what its schedule's table says: forward for one microbatch, backward for
another, or both, in this order:

    store    values that arrived with the last tick, into buffers
    forward  load them, run the stage, stash for backward, send to the next device
    backward load cotangents and the stash, run the stage's VJP, send to the device before

In training nothing differentiates the loop: a tick takes a stage's VJP by itself. Memory is bounded
by the stash, whatever the number of microbatches. A forward loop has no stash and can be
differentiated by `jax.grad`, with residuals of every tick.

A device may have several alternatives in a tick: stages of different chunks, all of a backward or a
half of it. Each runs under a condition. With one alternative there is no condition: an idle device
computes on the fill value and masks, since on accelerators the others wait for the slowest anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from layerwise_jax.run.buffers import empty_buffers, load, store
from layerwise_jax.run.conditions import run_selected
from layerwise_jax.run.linearize import lay_out_stash
from layerwise_jax.run.outputs import add_output, start_output
from layerwise_jax.run.residual_policies import Recomputing, Storing
from layerwise_jax.run.residuals import StashLayout
from layerwise_jax.run.stage import LateAfter, LocalStage, MicrobatchContext
from layerwise_jax.run.vjp import StageGradients, StageVjp
from layerwise_jax.run.wire import fill, from_wire, sum_dtype, to_wire, wire_aval, zeros_of
from layerwise_jax.schedule.arrays import BACKWARD_KINDS, ScheduleTables, lower_schedule
from layerwise_jax.schedule.generators import forward_only
from layerwise_jax.stage.staged_program import StagedProgram

# Ticks of one kind (only forward, both, only backward) are a loop each, up to this many loops.
MOST_PHASES = 4
TickRows = dict[str, np.ndarray]  # the schedule's tables: [ticks, devices] each


class TickState(NamedTuple):
    """Values that a device carries from tick to tick, in wire format.

    Attributes:
      arrived, arrived_gradients: values of each lane that arrived with the last tick.
      activations, gradients: buffers [slots + 1, ...] of values that arrived and are not used yet.
      stash: buffers [slots + 1, ...] of values that a forward leaves for its backward.
      accumulators: gradients of this device's weights so far, None for untrained slots.
      slots: this device's weights; state among them changes.
      outputs: outputs so far.
      kept: results of the last tick's body that `after` reads in this tick.
    """

    arrived: list[Any]
    arrived_gradients: list[Any]
    activations: list[Any]
    gradients: list[Any]
    stash: list[Any]
    accumulators: list[Any]
    slots: list[Any]
    outputs: list[Any]
    kept: list[Any]


class ForwardResults(NamedTuple):
    """Results of a tick's forward, in wire format.

    Attributes:
      sent: the value for each lane.
      state: the state slots.
      stashed: the values for the stash.
      outputs: the stage's outputs; empty in training, where backward makes them.
      kept: results of the body that `after` reads in the next tick.
    """

    sent: list[Any]
    state: list[Any]
    stashed: list[Any]
    outputs: list[Any]
    kept: list[Any]


@dataclass(frozen=True)
class Backward:
    """Options of the backward pass.

    Attributes:
      seed: the cotangent of the loss of one microbatch.
      recomputes: backward runs the stage again from the values that arrived; else it stashes
        residuals.
      skips_bubbles: an idle device branches around the work, which pays on emulated devices.
    """

    seed: float
    recomputes: bool = True
    skips_bubbles: bool = False


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
        """The forward loop: microbatches follow each other round the devices."""
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
        device = LocalStage(self.program, list(inputs), replica, gates=self.backward is None)
        stores = self.backward is not None and not self.backward.recomputes
        layout = lay_out_stash(device, weights) if stores else None
        state = self._start(list(weights), layout)
        for rows in self._phases():
            tick = _Tick(self, device, layout, rows)
            state, _ = lax.scan(tick, state, rows)
        return state.outputs, state.accumulators, state.slots

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
        """True if every activation is used in the tick after it was sent: it needs no buffer."""
        reads = self.tables.activation_read
        return bool(np.all((reads < 0) | (reads == self.tables.activation_arrival)))

    def _start(self, weights: list[Any], layout: StashLayout | None) -> TickState:
        program = self.program
        empty = program.bubble_fill
        lanes = [wire_aval(lane.aval) for lane in program.wiring.lanes]
        moving = [wire_aval(lane.aval) for lane in program.wiring.lanes if lane.has_gradient]
        state_avals = [wire_aval(jax.typeof(weights[j])) for j in program.state_slots]
        trains = self.backward is not None
        stashed = layout.avals if layout is not None else [*lanes, *state_avals] if trains else []
        tables = self.tables
        return TickState(
            arrived=[fill(aval, empty) for aval in lanes],
            arrived_gradients=[fill(aval, empty) for aval in moving] if trains else [],
            activations=[]
            if self.reads_arrivals_at_once
            else empty_buffers(lanes, tables.num_activation_slots, empty),
            gradients=empty_buffers(moving, tables.num_gradient_slots, empty) if trains else [],
            stash=empty_buffers(stashed, tables.num_stash_slots, empty),
            accumulators=[
                _accumulator(w) if trains and program.has_gradient(j) else None
                for j, w in enumerate(weights)
            ],
            slots=weights,
            outputs=[start_output(program, p, role) for p, role in enumerate(self.roles)],
            kept=[fill(wire_aval(program.program.avals[x]), empty) for x, _ in program.wiring.kept]
            if self.lags
            else [],
        )

    def _phases(self) -> list[TickRows]:
        """The tables in runs of ticks in which any device goes forward, backward, or both."""
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
        forward, backward = tables["forward_microbatch"], tables["backward_microbatch"]
        kinds = [
            (bool((f >= 0).any()), bool((b >= 0).any()))
            for f, b in zip(forward, backward, strict=True)
        ]
        counts = [len(list(ticks)) for _, ticks in groupby(kinds)]
        if self.backward is None or len(counts) > MOST_PHASES:
            counts = [len(kinds)]
        stops = np.cumsum(counts)
        return [
            {name: table[stop - count : stop] for name, table in tables.items()}
            for count, stop in zip(counts, stops, strict=True)
        ]


class _Tick:
    """One tick of a phase on one device: the body of a `lax.scan` over the phase's tables.

    Attributes:
      chunks: the chunks of which a device has a forward in this phase.
      backwards: the (chunk, kind) of which a device has a backward in this phase.
    """

    def __init__(
        self, loop: TickLoop, device: LocalStage, layout: StashLayout | None, rows: TickRows
    ):
        self.loop = loop
        self.device = device
        self.layout = layout
        self.program = loop.program
        self.lanes = device.wiring.lanes
        self.chunks = [chunk for (chunk,) in _occurring(rows["forward_chunk"])]
        self.backwards = _occurring(rows["backward_chunk"], rows["backward_kind"])

    def __call__(self, state: TickState, rows: dict[str, Any]) -> tuple[TickState, None]:
        now = {name: row[self.device.index] for name, row in rows.items()}  # int32 scalars
        state = state._replace(
            activations=store(state.activations, now["activation_arrival"], state.arrived)
            if state.activations
            else [],
            gradients=store(state.gradients, now["gradient_arrival"], state.arrived_gradients),
        )
        if self.chunks:
            state = self._forward(state, now)
        if self.backwards:
            state = self._backward(state, now)
        return state, None

    def _forward(self, state: TickState, now: dict[str, Any]) -> TickState:
        context = MicrobatchContext(self.device, now["forward_microbatch"])
        late = None
        if self.loop.lags:
            late = LateAfter(MicrobatchContext(self.device, now["late_microbatch"]), state.kept)
        results = self._run_forward(state, now, context, late)
        sent = [
            self.device.send(x, lane.pairs(self.program.num_devices), context)
            for x, lane in zip(results.sent, self.lanes, strict=True)
        ]
        slots = list(state.slots)
        for j, x in zip(self.program.state_slots, results.state, strict=True):
            slots[j] = from_wire(x, jax.typeof(slots[j]))
        state = state._replace(
            arrived=sent,
            stash=store(state.stash, now["stash_write"], results.stashed),
            slots=slots,
            kept=results.kept,
        )
        if self.loop.backward is not None:
            return state
        stage = jnp.clip(now["forward_chunk"], 0) * self.program.num_devices + self.device.index
        return self._add_outputs(state, results.outputs, stage, context, late)

    def _run_forward(
        self,
        state: TickState,
        now: dict[str, Any],
        context: MicrobatchContext,
        late: LateAfter | None,
    ) -> ForwardResults:
        arrived = state.arrived
        if state.activations:
            arrived = load(state.activations, now["activation_read"])

        def run(chunk: int, carry: ForwardResults) -> ForwardResults:
            del carry
            device = self.device.of_chunk(chunk)
            outputs: list[Any] = []
            if self.loop.backward is None:
                stashed: list[Any] = []
                results = device.run_stage(context, arrived, state.slots, late)
                after: dict[int, Any] = {}
                if late is None:
                    after = device.run_after(context, results, state.slots, "switch")
                outputs = [
                    after[output.source.result]
                    if output.lag and late is None
                    else to_wire(results.made(output.source))
                    for output in device.wiring.outputs
                ]
            else:
                results, stashed = self._vjp(chunk, context, state.slots).forward(arrived)
            sent = [to_wire(results.made(lane.source)) for lane in self.lanes]
            new_state = [to_wire(results.slots[j]) for j in self.program.state_slots]
            kept = [to_wire(results.made(x)) for _, x in device.wiring.kept] if late else []
            return ForwardResults(sent, new_state, stashed, outputs, kept)

        idle = ForwardResults(
            [zeros_of(lane.aval) for lane in self.lanes],
            [to_wire(state.slots[j]) for j in self.program.state_slots],
            [fill(jax.ShapeDtypeStruct(x.shape[1:], x.dtype), 0.0) for x in state.stash],
            self._no_outputs() if self.loop.backward is None else [],
            state.kept,
        )
        runs = {chunk: partial(run, chunk) for chunk in self.chunks}
        return self._run(runs, now["forward_chunk"], context, idle)

    def _backward(self, state: TickState, now: dict[str, Any]) -> TickState:
        context = MicrobatchContext(self.device, now["backward_microbatch"])
        pulled = self._run_backward(state, now, context)
        moving = [lane for lane in self.lanes if lane.has_gradient]
        sent = [
            self.device.send(
                gradient, [(b, a) for a, b in lane.pairs(self.program.num_devices)], context
            )
            for lane, gradient in zip(moving, pulled.arrived_gradients, strict=True)
        ]
        state = state._replace(arrived_gradients=sent, accumulators=list(pulled.accumulators))
        stage = now["backward_chunk"] * self.program.num_devices + self.device.index
        # "I" and "W" both make the outputs; they count once.
        is_first_half = now["backward_kind"] != BACKWARD_KINDS.index("W")
        return self._add_outputs(
            state, pulled.outputs, jnp.where(is_first_half, stage, -1), context, None
        )

    def _run_backward(
        self, state: TickState, now: dict[str, Any], context: MicrobatchContext
    ) -> StageGradients:
        stashed = load(state.stash, now["stash_read"])
        is_sent = now["gradient_read"] >= 0  # nothing comes back to the last stage
        gradients = [
            jnp.where(is_sent, g, jnp.zeros_like(g))
            for g in load(state.gradients, now["gradient_read"])
        ]

        def run(chunk: int, kind: int, carry: StageGradients) -> StageGradients:
            stage = self._vjp(chunk, context, state.slots)
            pulled = stage.backward(stashed, gradients, carry.accumulators, BACKWARD_KINDS[kind])
            return pulled._replace(outputs=[to_wire(x) for x in pulled.outputs])

        zeros = [jnp.zeros_like(g) for g in gradients]
        idle = StageGradients(zeros, state.accumulators, self._no_outputs())
        num_kinds = len(BACKWARD_KINDS)
        runs = {
            chunk * num_kinds + kind: partial(run, chunk, kind) for chunk, kind in self.backwards
        }
        code = now["backward_chunk"] * num_kinds + now["backward_kind"]
        return self._run(runs, code, context, idle)

    def _add_outputs(
        self,
        state: TickState,
        made: Sequence[Any],
        stage: Any,
        context: MicrobatchContext,
        late: LateAfter | None,
    ) -> TickState:
        """Add the outputs of one microbatch, those of `after` for the microbatch it ran for."""
        outputs = [
            add_output(
                role,
                so_far,
                x,
                late.context if late is not None and output.lag else context,
                stage == output.stage,
            )
            for role, so_far, x, output in zip(
                self.loop.roles, state.outputs, made, self.device.wiring.outputs, strict=True
            )
        ]
        return state._replace(outputs=outputs)

    def _no_outputs(self) -> list[Any]:
        return [zeros_of(self.program.output_aval(p)) for p in range(len(self.loop.roles))]

    def _vjp(self, chunk: int, context: MicrobatchContext, slots: list[Any]) -> StageVjp:
        backward = self.loop.backward
        assert backward is not None
        device = self.device.of_chunk(chunk)
        if self.layout is None:
            return Recomputing(device, context, slots, backward.seed)
        return Storing(device, context, slots, backward.seed, self.layout)

    def _run[T](
        self,
        runs: dict[int, Callable[[T], T]],
        code: Any,
        context: MicrobatchContext,
        idle: T,
    ) -> T:
        """Run the alternative that has this code; in a bubble any result will do: it is masked."""
        backward = self.loop.backward
        if backward is None:  # differentiable
            return run_selected(runs, jnp.clip(code, 0), idle, "switch", range(len(runs)))
        if len(runs) == 1 and not backward.skips_bubbles:
            (run,) = runs.values()
            return run(idle)
        active = jnp.where(context.is_active, code, -1)
        return run_selected(runs, active, idle, "at_most_once", range(-1, max(runs) + 1))


def _occurring(*tables: np.ndarray) -> list[tuple[int, ...]]:
    """The combinations of entries that occur where a device is not idle."""
    columns = np.stack([table.ravel() for table in tables], axis=1)
    return [tuple(map(int, row)) for row in np.unique(columns[columns[:, 0] >= 0], axis=0)]


def _accumulator(weight: Any) -> Any:
    """Zeros for a weight's gradients: float32 if the weight is narrower."""
    return jnp.zeros(weight.shape, sum_dtype(weight.dtype))
