"""Forward and backward by a schedule: a vjp a stage inside the tick loop.

Nothing differentiates the loop. Each tick a device does what its schedule's table says: forward for
one microbatch, backward for another, or both. Forward leaves in a stash what backward needs;
backward pulls the gradient back through the stage, and adds the weights' part to accumulators that
never leave the device. So memory is bounded by the stash, whatever the number of microbatches.

A schedule may have several things that a device could do in a tick: stages of different chunks, all
of a backward or one half of it. Each stands under a condition of its own. Where there is but one,
it stands free, and an idle device computes on what bubbles compute on; with `skips_bubbles` it too
has a condition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from layerwise_jax.run.buffers import do_if, empty_buffers, load, store
from layerwise_jax.run.linearize import lay_out_stash
from layerwise_jax.run.outputs import add_output, start_output
from layerwise_jax.run.residual_policies import Recomputing, Storing
from layerwise_jax.run.residuals import StashLayout
from layerwise_jax.run.stage import LocalStage, MicrobatchContext
from layerwise_jax.run.vjp import StageGradients, StageVjp
from layerwise_jax.run.wire import fill, from_wire, sum_dtype, to_wire, wire_aval
from layerwise_jax.schedule.arrays import BACKWARD_KINDS, ScheduleTables
from layerwise_jax.stage.staged_program import StagedProgram

# Ticks of one kind (only forward, both, only backward) are a loop of their own, if that makes no
# more than this many.
MOST_PHASES = 4
TickRows = dict[str, np.ndarray]


class TrainingState(NamedTuple):
    """What a device carries from tick to tick.

    Attributes:
      arrived, arrived_gradients: what came over each lane in the last tick, forward and backward.
      activations, gradients: what came and is not used yet, by slot; the last slot takes what is
        not for this device.
      stash: what each forward left for its backward; likewise.
      accumulators: gradients of this device's weights so far, None for what has none.
      slots: this device's weights, whose state changes.
      outputs: outputs so far.
    """

    arrived: list[Any]
    arrived_gradients: list[Any]
    activations: list[Any]
    gradients: list[Any]
    stash: list[Any]
    accumulators: list[Any]
    slots: list[Any]
    outputs: list[Any]


@dataclass(frozen=True, eq=False)
class TrainingLoop:
    """A loop's stages run by a schedule.

    Attributes:
      loop: stages, wiring and placement.
      tables: the schedule, as arrays.
      roles: for every output, how microbatches combine: "rows", "reduced" or "whole".
      seed: the gradient of the loss of one microbatch.
      recomputes: whether backward runs the stage again from what had arrived, instead of stashing
        residuals.
      skips_bubbles: whether an idle device branches around the work.
    """

    loop: StagedProgram
    tables: ScheduleTables
    roles: tuple[str, ...]
    seed: float
    recomputes: bool = True
    skips_bubbles: bool = False

    def run(
        self, weights: Sequence[Any], inputs: Sequence[Any], replica: Any
    ) -> tuple[list[Any], list[Any], list[Any]]:
        """All ticks on this device.

        Args:
          weights: this device's row of every slot, in the weight's own shape.
          inputs: every input leaf: (microbatches, ...) where it is split, whole otherwise.
          replica: this device's index on the data axis.

        Returns:
          Outputs: stacked over microbatches if they are rows, else summed or taken once, zero on
            other devices than
          the one that makes them. Gradients by slot (None for what has none). Slots afterwards.
        """
        device = LocalStage(self.loop, list(inputs), replica, gates=False)
        layout = None if self.recomputes else lay_out_stash(device, weights)
        state = self._start(list(weights), layout)
        for rows in self._phases():
            state, _ = lax.scan(
                partial(self._tick, _Actions(self, device, layout, rows)), state, rows
            )
        return state.outputs, state.accumulators, state.slots

    def _start(self, weights: list[Any], layout: StashLayout | None) -> TrainingState:
        loop, empty = self.loop, self.loop.bubble_fill
        lanes = [wire_aval(lane.aval) for lane in loop.wiring.lanes]
        moving = [wire_aval(lane.aval) for lane in loop.wiring.lanes if lane.has_gradient]
        state_avals = [wire_aval(jax.typeof(weights[j])) for j in loop.state_slots]
        stashed = [*lanes, *state_avals] if layout is None else layout.avals
        return TrainingState(
            arrived=[fill(aval, empty) for aval in lanes],
            arrived_gradients=[fill(aval, empty) for aval in moving],
            activations=empty_buffers(lanes, self.tables.num_activation_slots, empty),
            gradients=empty_buffers(moving, self.tables.num_gradient_slots, empty),
            stash=empty_buffers(stashed, self.tables.num_stash_slots, empty),
            accumulators=[
                _accumulator(w) if loop.has_gradient(j) else None for j, w in enumerate(weights)
            ],
            slots=weights,
            outputs=[start_output(loop, p, role) for p, role in enumerate(self.roles)],
        )

    def _phases(self) -> list[TickRows]:
        """The tables in runs of ticks in which any device goes forward, any goes backward, or
        both.
        """
        tables = {
            name: table
            for name, table in vars(self.tables).items()
            if isinstance(table, np.ndarray)
        }
        kinds = [
            (bool((f >= 0).any()), bool((b >= 0).any()))
            for f, b in zip(
                self.tables.forward_microbatch, self.tables.backward_microbatch, strict=True
            )
        ]
        counts = [len(list(ticks)) for _, ticks in groupby(kinds)]
        counts = counts if len(counts) <= MOST_PHASES else [len(kinds)]
        stops = np.cumsum(counts)
        return [
            {name: table[stop - count : stop] for name, table in tables.items()}
            for count, stop in zip(counts, stops, strict=True)
        ]

    def _tick(
        self, actions: _Actions, state: TrainingState, rows: dict[str, Any]
    ) -> tuple[TrainingState, None]:
        now = {name: row[actions.device.index] for name, row in rows.items()}
        state = state._replace(
            activations=store(state.activations, now["activation_arrival"], state.arrived),
            gradients=store(state.gradients, now["gradient_arrival"], state.arrived_gradients),
        )
        if actions.forwards:
            state = self._forward(actions, state, now)
        if actions.backwards:
            state = self._backward(actions, state, now)
        return state, None

    def _forward(
        self, actions: _Actions, state: TrainingState, now: dict[str, Any]
    ) -> TrainingState:
        moment = MicrobatchContext(actions.device, now["forward_microbatch"])
        arrived = load(state.activations, now["activation_read"])
        made, new_state, stashed = actions.forward(moment, now, arrived, state)
        sent = [
            actions.device.send(x, lane.pairs(self.loop.num_devices), moment)
            for x, lane in zip(made, self.loop.wiring.lanes, strict=True)
        ]
        slots = list(state.slots)
        for j, x in zip(self.loop.state_slots, new_state, strict=True):
            slots[j] = from_wire(x, jax.typeof(slots[j]))
        return state._replace(
            arrived=sent, stash=store(state.stash, now["stash_write"], stashed), slots=slots
        )

    def _backward(
        self, actions: _Actions, state: TrainingState, now: dict[str, Any]
    ) -> TrainingState:
        moment = MicrobatchContext(actions.device, now["backward_microbatch"])
        pulled = actions.backward(moment, now, state)
        moving = [lane for lane in self.loop.wiring.lanes if lane.has_gradient]
        sent = [
            actions.device.send(
                gradient, [(b, a) for a, b in lane.pairs(self.loop.num_devices)], moment
            )
            for lane, gradient in zip(moving, pulled.arrived_gradients, strict=True)
        ]
        stage = now["backward_chunk"] * self.loop.num_devices + actions.device.index
        is_first_half = now["backward_kind"] != BACKWARD_KINDS.index("W")
        outputs = [
            add_output(role, so_far, made, moment, is_first_half & (stage == output.stage))
            for role, so_far, made, output in zip(
                self.roles, state.outputs, pulled.outputs, self.loop.wiring.outputs, strict=True
            )
        ]
        return state._replace(
            arrived_gradients=sent, accumulators=list(pulled.accumulators), outputs=outputs
        )


class _Actions:
    """What a device may have to do in a phase of the schedule, and how it does what it has to do
    now.
    """

    def __init__(
        self, training: TrainingLoop, device: LocalStage, layout: StashLayout | None, rows: TickRows
    ):
        self.training, self.device, self.layout, self.loop = training, device, layout, device.loop
        self.forwards = _occurring(rows["forward_chunk"])
        self.backwards = _occurring(rows["backward_chunk"], rows["backward_kind"])

    def forward(
        self,
        moment: MicrobatchContext,
        now: dict[str, Any],
        arrived: list[Any],
        state: TrainingState,
    ) -> Any:
        """What goes over the lanes, new state, and what is stashed, all as they are held."""
        lanes = [wire_aval(lane.aval) for lane in self.loop.wiring.lanes]

        def run(chunk: int, carry: Any) -> tuple[list[Any], list[Any], list[Any]]:
            del carry
            results, stashed = self._stage(chunk, moment, state.slots).forward(arrived)
            made = [to_wire(results.made(lane.source)) for lane in self.loop.wiring.lanes]
            return made, [to_wire(results.slots[j]) for j in self.loop.state_slots], stashed

        idle = (
            [fill(aval, 0.0) for aval in lanes],
            [to_wire(state.slots[j]) for j in self.loop.state_slots],
            [fill(jax.ShapeDtypeStruct(x.shape[1:], x.dtype), 0.0) for x in state.stash],
        )
        return self._do(
            moment,
            {key: partial(run, *key) for key in self.forwards},
            (now["forward_chunk"],),
            idle,
        )

    def backward(
        self, moment: MicrobatchContext, now: dict[str, Any], state: TrainingState
    ) -> StageGradients:
        """Gradients of what arrived, accumulators and outputs, all as they are held."""
        stashed = load(state.stash, now["stash_read"])
        came = now["gradient_read"] >= 0  # the last stage's gradient is the loss's alone
        gradients = [
            jnp.where(came, g, jnp.zeros_like(g))
            for g in load(state.gradients, now["gradient_read"])
        ]

        def run(chunk: int, kind: int, carry: StageGradients) -> StageGradients:
            stage = self._stage(chunk, moment, state.slots)
            pulled = stage.backward(stashed, gradients, carry.accumulators, BACKWARD_KINDS[kind])
            return pulled._replace(outputs=[to_wire(x) for x in pulled.outputs])

        outputs = [
            fill(wire_aval(self.loop.output_aval(p)), 0.0) for p in range(len(state.outputs))
        ]
        idle = StageGradients([jnp.zeros_like(g) for g in gradients], state.accumulators, outputs)
        here = (now["backward_chunk"], now["backward_kind"])
        return self._do(moment, {key: partial(run, *key) for key in self.backwards}, here, idle)

    def _stage(self, chunk: int, moment: MicrobatchContext, slots: list[Any]) -> StageVjp:
        device = self.device.of_chunk(chunk)
        if self.layout is None:
            return Recomputing(device, moment, slots, self.training.seed)
        return Storing(device, moment, slots, self.training.seed, self.layout)

    def _do(
        self,
        moment: MicrobatchContext,
        runs: dict[tuple[int, ...], Callable],
        here: tuple[Any, ...],
        idle: Any,
    ) -> Any:
        """What the one of `runs` whose key is `here` makes of `idle`; `idle` itself while the
        device has nothing.
        """
        if len(runs) == 1 and not self.training.skips_bubbles:
            (run,) = runs.values()
            return run(idle)
        done = idle
        for key, run in runs.items():
            matches = jnp.stack([x == y for x, y in zip(here, key, strict=True)]).all()
            done = do_if(moment.is_active & matches, run, done)
        return done


def _occurring(*tables: np.ndarray) -> list[tuple[int, ...]]:
    """The combinations of entries that occur where a device is not idle."""
    columns = np.stack([table.ravel() for table in tables], axis=1)
    return [tuple(map(int, row)) for row in np.unique(columns[columns[:, 0] >= 0], axis=0)]


def _accumulator(weight: Any) -> Any:
    """Where a weight's gradients add up: in float32 if the weight is narrower."""
    return jnp.zeros(weight.shape, sum_dtype(weight.dtype))
