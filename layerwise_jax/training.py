"""Forward and backward by a schedule: a vjp a stage inside the tick loop.

Nothing differentiates the loop. Each tick a device does what its schedule's table says: forward for one microbatch,
backward for another, or both. Forward leaves what had arrived in a stash; backward computes the stage again from
there, pulls the gradient back through it, and adds the weights' part to accumulators that never leave the device. So
memory is bounded by the stash, whatever the number of microbatches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from layerwise_jax.loop import Loop
from layerwise_jax.on_device import Moment, StageOnDevice, fill, from_wire, sum_dtype, to_wire, wire_aval
from layerwise_jax.placement import STAGE
from layerwise_jax.schedule_tables import ScheduleTables
from layerwise_jax.stage_vjp import StageVjp, is_inexact

# Ticks of one kind (only forward, both, only backward) are a loop of their own, if that makes no more than this many.
MOST_PHASES = 4


class TrainingState(NamedTuple):
    """What a device carries from tick to tick.

    Attributes:
      arrived, arrived_gradients: what came over each lane in the last tick, forward and backward.
      activations, gradients: what came and is not used yet, by slot; the last slot takes what is not for this device.
      stash: what each forward found: lanes, then state; likewise.
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
    """

    loop: Loop
    tables: ScheduleTables
    roles: tuple[str, ...]
    seed: float

    def run(
        self, weights: Sequence[Any], inputs: Sequence[Any], replica: Any
    ) -> tuple[list[Any], list[Any], list[Any]]:
        """All ticks on this device.

        Args:
          weights: this stage's row of every slot, in the weight's own shape.
          inputs: every input leaf: (microbatches, ...) where it is split, whole otherwise.
          replica: this device's index on the data axis.

        Returns:
          Outputs: stacked over microbatches if they are rows, else summed or taken once, zero on other stages than the
          one that makes them. Gradients by slot (None for integers). Slots afterwards.
        """
        device = StageOnDevice(self.loop, list(inputs), lax.axis_index(STAGE), replica)
        state = self._start(list(weights))
        for (forward, backward), rows in self._phases():
            tick = partial(self._tick, device, forward, backward)
            state, _ = lax.scan(tick, state, rows)
        return state.outputs, state.accumulators, state.slots

    def _start(self, weights: list[Any]) -> TrainingState:
        loop, empty = self.loop, self.loop.bubble_fill
        lanes = [wire_aval(lane.aval) for lane in loop.wiring.lanes]
        moving = [wire_aval(lane.aval) for lane in loop.wiring.lanes if lane.has_gradient]
        state_avals = [wire_aval(jax.typeof(weights[j])) for j in loop.state_slots]

        def buffers(avals: Sequence[Any], count: int) -> list[Any]:
            return [fill(jax.ShapeDtypeStruct((count + 1, *aval.shape), aval.dtype), empty) for aval in avals]

        return TrainingState(
            arrived=[fill(aval, empty) for aval in lanes],
            arrived_gradients=[fill(aval, empty) for aval in moving],
            activations=buffers(lanes, self.tables.num_activation_slots),
            gradients=buffers(moving, self.tables.num_gradient_slots),
            stash=buffers([*lanes, *state_avals], self.tables.num_stash_slots),
            accumulators=[_accumulator(w, j in loop.state_slots) for j, w in enumerate(weights)],
            slots=weights,
            outputs=[self._output_start(p) for p in range(len(self.roles))],
        )

    def _output_start(self, position: int) -> Any:
        aval = wire_aval(self.loop.output_aval(position))
        if self.roles[position] == "rows":
            return jnp.zeros((self.loop.num_microbatches, *aval.shape), aval.dtype)
        dtype = sum_dtype(aval.dtype) if self.roles[position] == "reduced" else aval.dtype
        return jnp.zeros(aval.shape, dtype)

    def _phases(self) -> list[tuple[tuple[bool, bool], dict[str, Any]]]:
        """Runs of ticks in which any device goes forward, any goes backward, or both; with their rows of the tables."""
        tables = {name: table for name, table in vars(self.tables).items() if isinstance(table, np.ndarray)}
        kinds = [
            (bool((f >= 0).any()), bool((b >= 0).any()))
            for f, b in zip(self.tables.forward_microbatch, self.tables.backward_microbatch, strict=True)
        ]
        runs = [(kind, len(list(ticks))) for kind, ticks in groupby(kinds)]
        if len(runs) > MOST_PHASES:
            runs = [((True, True), len(kinds))]
        stops = np.cumsum([count for _, count in runs])
        return [
            (kind, {name: table[stop - count : stop] for name, table in tables.items()})
            for (kind, count), stop in zip(runs, stops, strict=True)
        ]

    def _tick(
        self, device: StageOnDevice, forward: bool, backward: bool, state: TrainingState, rows: dict[str, Any]
    ) -> tuple[TrainingState, None]:
        now = {name: row[device.stage] for name, row in rows.items()}
        state = state._replace(
            activations=_store(state.activations, now["activation_arrival"], state.arrived),
            gradients=_store(state.gradients, now["gradient_arrival"], state.arrived_gradients),
        )
        if forward:
            state = self._forward(device, state, now)
        if backward:
            state = self._backward(device, state, now)
        return state, None

    def _forward(self, device: StageOnDevice, state: TrainingState, now: dict[str, Any]) -> TrainingState:
        moment = Moment(device, now["forward_microbatch"])
        arrived = _load(state.activations, now["activation_read"])
        old = [to_wire(state.slots[j]) for j in self.loop.state_slots]
        stash = _store(state.stash, now["stash_write"], [*arrived, *old])
        results = device.run_stage(moment, arrived, state.slots)
        sent = [device.send(results.made(lane.source), lane.pairs, moment) for lane in self.loop.wiring.lanes]
        return state._replace(arrived=sent, stash=stash, slots=results.slots)

    def _backward(self, device: StageOnDevice, state: TrainingState, now: dict[str, Any]) -> TrainingState:
        """The vjp of the stage for one microbatch, piece by piece from the back."""
        moment = Moment(device, now["backward_microbatch"])
        stashed = _load(state.stash, now["stash_read"])
        lanes = self.loop.wiring.lanes
        slots = list(state.slots)
        for j, old in zip(self.loop.state_slots, stashed[len(lanes) :], strict=True):
            slots[j] = from_wire(old, jax.typeof(slots[j]))
        came = now["gradient_read"] >= 0  # the last stage's gradient is the loss's alone
        gradients = [jnp.where(came, g, jnp.zeros_like(g)) for g in _load(state.gradients, now["gradient_read"])]
        pull = StageVjp(device, self.seed, moment, stashed[: len(lanes)], slots, gradients, state.accumulators)
        pulled = pull.run()
        moving = [lane for lane in lanes if lane.has_gradient]
        sent = [
            device.send(gradient, [(b, a) for a, b in lane.pairs], moment)
            for lane, gradient in zip(moving, pulled.arrived_gradients, strict=True)
        ]
        outputs = [
            self._add_output(device, position, so_far, pulled.outputs[position], moment)
            for position, so_far in enumerate(state.outputs)
        ]
        return state._replace(arrived_gradients=sent, accumulators=pulled.accumulators, outputs=outputs)

    def _add_output(self, device: StageOnDevice, position: int, so_far: Any, made: Any, moment: Moment) -> Any:
        mine = moment.is_active & (device.stage == self.loop.wiring.outputs[position].stage)
        made = to_wire(made)
        if self.roles[position] == "rows":
            row = jnp.where(mine, made, so_far[moment.index])
            return lax.dynamic_update_index_in_dim(so_far, row, moment.index, 0)
        if self.roles[position] == "reduced":
            return so_far + jnp.where(mine, made, jnp.zeros_like(made)).astype(so_far.dtype)
        return jnp.where(mine & (moment.index == 0), made, so_far)


def _accumulator(weight: Any, is_state: bool) -> Any:
    """Where a weight's gradients add up: in float32 if the weight is narrower; None if it has no gradient."""
    if is_state or not is_inexact(weight):
        return None
    return jnp.zeros(weight.shape, sum_dtype(weight.dtype))


def _store(buffers: list[Any], slot: Any, values: Sequence[Any]) -> list[Any]:
    """Each value into its buffer's slot; slot -1 is the last, which nothing reads."""
    return [
        lax.dynamic_update_index_in_dim(buffer, to_wire(x), jnp.where(slot < 0, buffer.shape[0] - 1, slot), 0)
        for buffer, x in zip(buffers, values, strict=True)
    ]


def _load(buffers: list[Any], slot: Any) -> list[Any]:
    return [
        lax.dynamic_index_in_dim(buffer, jnp.where(slot < 0, buffer.shape[0] - 1, slot), 0, keepdims=False)
        for buffer in buffers
    ]
