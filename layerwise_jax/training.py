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
from layerwise_jax.on_device import Moment, StageOnDevice, fill, from_wire, to_wire, wire_aval
from layerwise_jax.placement import STAGE
from layerwise_jax.program import Value
from layerwise_jax.schedule_tables import ScheduleTables
from layerwise_jax.wiring import FromBody, FromBranch

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
        moving = [aval for aval in lanes if jnp.issubdtype(aval.dtype, jnp.inexact)]
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
        dtype = jnp.promote_types(aval.dtype, jnp.float32) if self.roles[position] == "reduced" else aval.dtype
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
        pulled = _Pull(self, device, moment, stashed[: len(lanes)], slots, gradients, state.accumulators).run()
        moving = [lane for lane in lanes if jnp.issubdtype(wire_aval(lane.aval).dtype, jnp.inexact)]
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


class _Pulled(NamedTuple):
    arrived_gradients: list[Any]
    accumulators: list[Any]
    outputs: list[Any]


class _Pull:
    """One stage's vjp for one microbatch: `after`, then the body, then `before`."""

    def __init__(
        self,
        training: TrainingLoop,
        device: StageOnDevice,
        moment: Moment,
        arrived: list[Any],
        slots: list[Any],
        gradients: list[Any],
        accumulators: list[Any],
    ):
        self.training, self.device, self.moment, self.slots = training, device, moment, slots
        self.loop, self.wiring = training.loop, training.loop.wiring
        self.arrived, self.accumulators = arrived, list(accumulators)
        self.lane_gradients = self._by_lane(gradients)
        self.of_body: dict[int, Any] = {}
        self.of_branch: dict[int, Any] = {}
        self.of_lanes = {j: jnp.zeros_like(g) for j, g in self.lane_gradients.items()}

    def _by_lane(self, gradients: list[Any]) -> dict[int, Any]:
        moving = [
            j for j, lane in enumerate(self.wiring.lanes) if jnp.issubdtype(wire_aval(lane.aval).dtype, jnp.inexact)
        ]
        return dict(zip(moving, gradients, strict=True))

    def run(self) -> _Pulled:
        for j, gradient in self.lane_gradients.items():
            self._add(self.wiring.lanes[j].source, gradient)
        for output, seed in zip(self.wiring.outputs, self._seeds(), strict=True):
            if seed is not None and output.lag == 0:
                self._add(output.source, jnp.where(self.device.stage == output.stage, seed, jnp.zeros_like(seed)))
        if self.loop.has_body:
            branch = self.device.run_before(self.moment, self.arrived, self.slots)
            body, pull_body = self._body_vjp(branch)
            late = self._pull_after(body, branch)
            self._pull_body(pull_body)
            self._pull_before()
        else:
            branch, body, late = self._pull_before(), {}, {}
        outputs = [
            late[p] if p in late else (body if isinstance(o.source, FromBody) else branch)[o.source.result]
            for p, o in enumerate(self.wiring.outputs)
        ]
        return _Pulled([self.of_lanes[j] for j in sorted(self.of_lanes)], self.accumulators, outputs)

    def _seeds(self) -> list[Any]:
        """The gradient of the loss with respect to each output: a number for the first, nothing for the rest."""
        loss = self.loop.output_aval(0)
        return [jnp.full(loss.shape, self.training.seed, loss.dtype)] + [None] * (len(self.wiring.outputs) - 1)

    def _add(self, source: FromBody | FromBranch, gradient: Any) -> None:
        into = self.of_body if isinstance(source, FromBody) else self.of_branch
        into[source.result] = into[source.result] + gradient if source.result in into else gradient

    def _body_vjp(self, branch: list[Any]) -> tuple[dict[int, Any], Any]:
        reads = self.device.body_reads(self.moment, self.arrived, branch)
        shape = self.loop.alignment.parts[0].shape
        weights = self.slots[: len(shape.weights)]
        moving, fixed = _split_inexact([*weights, *reads])
        results, pull = jax.vjp(lambda moving: self.device.run_body(self.moment, _join(moving, fixed)), moving)
        return results, pull

    def _pull_body(self, pull: Any) -> None:
        shape, results = self.loop.alignment.parts[0].shape, self.wiring.body_results
        seeds = {}
        for j in results:
            aval = self.loop.program.avals[shape.made[j]]
            seeds[j] = _cotangent(aval, self.of_body.get(j))
        (gradients,) = pull(seeds)
        num_weights = len(shape.weights)
        for j, gradient in gradients.items():
            if j < num_weights:
                self._accumulate(j, gradient)
            else:
                self._pull_read(self.wiring.body_reads[j - num_weights], gradient)

    def _pull_read(self, source: Any, gradient: Any) -> None:
        if isinstance(source, FromBranch):
            self._add(source, gradient)
        elif hasattr(source, "lane"):
            self.of_lanes[source.lane] = self.of_lanes[source.lane] + gradient

    def _accumulate(self, slot: int, gradient: Any) -> None:
        self.accumulators[slot] = _accumulated(self.accumulators[slot], gradient, self.moment.is_active)

    def _pull_after(self, body: dict[int, Any], branch: list[Any]) -> dict[int, Any]:
        """Outputs of what follows the last stage's body; gradients of what it reads, and of its weights."""
        last, loop = self.loop.num_stages - 1, self.loop
        positions = [p for p, output in enumerate(self.wiring.outputs) if output.lag]
        if not loop.alignment.parts[last].after:
            return {}
        kept = {x: (body if isinstance(s, FromBody) else branch)[s.result] for x, s in self.wiring.kept}
        seeds = self._seeds()
        wanted = [loop.stages[last].outputs[p] for p in positions]

        def on_last(accumulators: list[Any]) -> tuple[list[Any], list[Any], list[Any]]:
            known = self.device.known(self.moment, last, self.slots) | kept
            results, of_kept, accumulators = self._pull_ops(
                last, loop.alignment.parts[last].after, known, kept, wanted, [seeds[p] for p in positions], accumulators
            )
            return [to_wire(x) for x in results], of_kept, accumulators

        def elsewhere(accumulators: list[Any]) -> tuple[list[Any], list[Any], list[Any]]:
            outputs = [fill(wire_aval(loop.output_aval(p)), 0.0) for p in positions]
            return outputs, [jnp.zeros_like(x) for x in kept.values() if _is_inexact(x)], accumulators

        made, of_kept, self.accumulators = lax.cond(self.device.stage == last, on_last, elsewhere, self.accumulators)
        moving = [source for x, source in self.wiring.kept if _is_inexact(kept[x])]
        for source, gradient in zip(moving, of_kept, strict=True):
            self._add(source, gradient)
        return {p: from_wire(x, loop.output_aval(p)) for p, x in zip(positions, made, strict=True)}

    def _pull_before(self) -> list[Any]:
        """The branches' results; gradients of what arrived and of the branches' weights."""
        if not self.wiring.needs_branch:
            return []
        branches = [partial(self._pull_branch, s) for s in range(self.loop.num_stages)]
        operands = (self.accumulators, dict(self.of_branch))
        if len(branches) == 1:
            results, of_lanes, self.accumulators = branches[0](*operands)
        else:
            results, of_lanes, self.accumulators = lax.switch(self.device.stage, branches, *operands)
        for j, gradient in of_lanes.items():
            self.of_lanes[j] = self.of_lanes[j] + gradient
        return [from_wire(x, aval) for x, (aval, _) in zip(results, self.wiring.branch_results, strict=True)]

    def _pull_branch(
        self, s: int, accumulators: list[Any], of_branch: dict[int, Any]
    ) -> tuple[list[Any], dict[int, Any], list[Any]]:
        part = self.loop.alignment.parts[s]
        late = {x for op in part.after for x in op.results}
        values = [row[s] for _, row in self.wiring.branch_results]
        asked = [r for r, x in enumerate(values) if x is not None and x not in late]
        arrived = self.device.arrived_values(s, self.arrived)
        known = self.device.known(self.moment, s, self.slots) | arrived
        results, of_arrived, accumulators = self._pull_ops(
            s, part.before, known, arrived, [values[r] for r in asked], [of_branch.get(r) for r in asked], accumulators
        )
        made = dict(zip(asked, results, strict=True))
        moving = [x for x, v in arrived.items() if _is_inexact(v)]
        gradients = dict(zip(moving, of_arrived, strict=True))
        came = {j: lane.values[s - 1] if s else None for j, lane in enumerate(self.wiring.lanes) if j in self.of_lanes}
        of_lanes = {
            j: jnp.zeros_like(self.of_lanes[j]) if x not in gradients else gradients[x] for j, x in came.items()
        }
        rows = [
            to_wire(made[r]) if r in made else fill(wire_aval(aval), 0.0)
            for r, (aval, _) in enumerate(self.wiring.branch_results)
        ]
        return rows, of_lanes, accumulators

    def _pull_ops(
        self,
        s: int,
        ops: Sequence[Any],
        known: dict[Value, Any],
        reads: dict[Value, Any],
        wanted: Sequence[Any],
        seeds: Sequence[Any],
        accumulators: list[Any],
    ) -> tuple[list[Any], list[Any], list[Any]]:
        """The vjp of `ops` on stage s: wanted values, gradients of inexact reads, accumulators with the weights'."""
        used = {x for op in ops for x in op.values}
        slot_of = self.loop.placement.slot_of(s)
        weights = {x: slot_of[weight] for x, weight in self.loop.stages[s].weights.items() if x in used or x in wanted}
        moving = {x: known[x] for x in [*weights, *reads] if _is_inexact(known[x])}
        results, pull = jax.vjp(lambda moving: self.device.evaluate(ops, known | moving, wanted, self.moment), moving)
        cotangents = [_cotangent(jax.typeof(x), seed) for x, seed in zip(results, seeds, strict=True)]
        (gradients,) = pull(cotangents)
        accumulators = list(accumulators)
        for x, slot in weights.items():
            if x in gradients and accumulators[slot] is not None:
                accumulators[slot] = _accumulated(accumulators[slot], gradients[x], self.moment.is_active)
        return list(results), [gradients[x] for x, v in reads.items() if _is_inexact(v)], accumulators


def _accumulator(weight: Any, is_state: bool) -> Any:
    """Where a weight's gradients add up: in float32 if the weight is narrower; None if it has no gradient."""
    if is_state or not _is_inexact(weight):
        return None
    return jnp.zeros(weight.shape, jnp.promote_types(weight.dtype, jnp.float32))


def _accumulated(so_far: Any, gradient: Any, is_active: Any) -> Any:
    if so_far is None:
        return None
    return jnp.where(is_active, so_far + gradient.astype(so_far.dtype), so_far)


def _is_inexact(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _split_inexact(values: Sequence[Any]) -> tuple[dict[int, Any], dict[int, Any]]:
    """Values by position: those that have gradients, and the others."""
    moving = {j: x for j, x in enumerate(values) if _is_inexact(x)}
    return moving, {j: x for j, x in enumerate(values) if j not in moving}


def _join(moving: dict[int, Any], fixed: dict[int, Any]) -> list[Any]:
    return [x for _, x in sorted({**moving, **fixed}.items())]


def _cotangent(aval: Any, gradient: Any) -> Any:
    """A gradient as a vjp takes it: zeros where there is none, float0 for what has none."""
    if not jnp.issubdtype(aval.dtype, jnp.inexact):
        return np.zeros(aval.shape, jax.dtypes.float0)
    return jnp.zeros(aval.shape, aval.dtype) if gradient is None else gradient.astype(aval.dtype)


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
