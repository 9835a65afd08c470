"""One tick of the loop on one device: forward, backward, and the messages of both.

A device may have several alternatives in a tick: stages of different chunks, all of a backward or a
half of it. Each runs under a condition. With one alternative there is no condition: an idle device
computes on the fill value and masks, since on accelerators the others wait for the slowest anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from layerwise_jax.run.buffers import load, store, take
from layerwise_jax.run.conditions import run_selected
from layerwise_jax.run.microbatch import LateAfter, MicrobatchContext
from layerwise_jax.run.outputs import add_output
from layerwise_jax.run.residual_policies import Recomputing, Storing
from layerwise_jax.run.residuals import StashLayout
from layerwise_jax.run.stage import LocalStage
from layerwise_jax.run.vjp import StageGradients, StageVjp
from layerwise_jax.run.wire import fill, from_wire, to_wire, zeros_of
from layerwise_jax.schedule.arrays import BACKWARD_KINDS

TickRows = dict[str, np.ndarray]  # the schedule's tables: [ticks, devices] each


class TickState(NamedTuple):
    """Values that a device carries from tick to tick, in wire format.

    Attributes:
      arrived: the value of each lane from the last tick, if the loop has no buffers for them.
      activations, gradients: buffers [slots + 1, ...] of values that arrived and are not used yet.
      stash: buffers [slots + 1, ...] of values that a forward leaves for its backward.
      accumulators: gradients of this device's weights so far, None for untrained slots.
      slots: this device's weights; state among them changes.
      outputs: outputs so far.
      kept: results of the last tick's body that `after` reads in this tick.
    """

    arrived: list[Any]
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
      remat: "stage" runs the stage again from the values that arrived; "cheap" stashes results of
        expensive ops and recomputes the rest; None stashes all residuals.
      skips_bubbles: an idle device branches around the work, which pays on emulated devices.
    """

    seed: float
    remat: Literal["stage", "cheap"] | None = "stage"
    skips_bubbles: bool = False


@dataclass(frozen=True, eq=False)
class TickOptions:
    """Properties that all ticks of a loop share.

    Attributes:
      roles: for every output, how microbatches combine: "rows", "reduced" or "whole".
      backward: options of the backward pass; None runs forward only.
      lags: `after` runs a tick behind its body.
      layout: stash buffers for residuals; None if backward recomputes the stage.
    """

    roles: tuple[str, ...]
    backward: Backward | None
    lags: bool
    layout: StashLayout | None


class Tick:
    """One tick of a phase on one device: the body of a `lax.scan` over the phase's tables.

    Attributes:
      device: any chunk of the device.
      options: the same for all phases.
      chunks: the chunks of which a device has a forward in this phase.
      backwards: the (chunk, kind) of which a device has a backward in this phase.
      runs_bubbles: a device that has no backward in a tick runs one anyway, on the fill value.
    """

    def __init__(self, device: LocalStage, options: TickOptions, rows: TickRows):
        self.device = device
        self.options = options
        self.program = device.loop
        self.lanes = device.wiring.lanes
        self.chunks = [chunk for (chunk,) in occurring(rows["forward_chunk"])]
        self.backwards = occurring(rows["backward_chunk"], rows["backward_kind"])
        has_bubble = bool((rows["backward_microbatch"] < 0).any())
        self.runs_bubbles = has_bubble and not self._is_conditional(self.backwards)

    def __call__(self, state: TickState, rows: dict[str, Any]) -> tuple[TickState, None]:
        now = {name: row[self.device.index] for name, row in rows.items()}  # int32 scalars
        if self.chunks:
            state = self._forward(state, now)
        if self.backwards:
            state = self._backward(state, now)
        return state, None

    def _forward(self, state: TickState, now: dict[str, Any]) -> TickState:
        context = MicrobatchContext(self.device, now["forward_microbatch"])  # -1: a bubble
        late = None
        if self.options.lags:
            late = LateAfter(MicrobatchContext(self.device, now["late_microbatch"]), state.kept)
        arrived = state.arrived
        if state.activations:
            arrived, activations = take(state.activations, now["activation_read"])
            state = state._replace(activations=activations)
        results = self._run_forward(state, arrived, now, context, late)
        sent = [
            self.device.send(x, lane.pairs(self.program.num_devices), context)
            for x, lane in zip(results.sent, self.lanes, strict=True)
        ]
        slots = list(state.slots)
        for j, x in zip(self.program.state_slots, results.state, strict=True):
            slots[j] = from_wire(x, jax.typeof(slots[j]))
        # Stored in the tick that sends it: XLA would move a permute whose result is carried to the
        # start of the next iteration, where it overlaps nothing.
        is_buffered = bool(state.activations)
        state = state._replace(
            arrived=[] if is_buffered else sent,
            activations=store(state.activations, now["activation_arrival"], sent)
            if is_buffered
            else [],
            stash=store(state.stash, now["stash_write"], results.stashed),
            slots=slots,
            kept=results.kept,
        )
        if self.options.backward is not None:
            return state
        stage = jnp.clip(now["forward_chunk"], 0) * self.program.num_devices + self.device.index
        return self._add_outputs(state, results.outputs, stage, context, late)

    @jax.named_scope("forward")
    def _run_forward(
        self,
        state: TickState,
        arrived: list[Any],
        now: dict[str, Any],
        context: MicrobatchContext,
        late: LateAfter | None,
    ) -> ForwardResults:
        def run(chunk: int, carry: ForwardResults) -> ForwardResults:
            del carry
            device = self.device.of_chunk(chunk)
            outputs: list[Any] = []
            if self.options.backward is None:
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
            self._no_outputs() if self.options.backward is None else [],
            state.kept,
        )
        runs = {chunk: partial(run, chunk) for chunk in self.chunks}
        return self._run(runs, now["forward_chunk"], context, idle)

    def _backward(self, state: TickState, now: dict[str, Any]) -> TickState:
        context = MicrobatchContext(self.device, now["backward_microbatch"])
        arrived, buffers = take(state.gradients, now["gradient_read"])
        state = state._replace(gradients=buffers)
        pulled = self._run_backward(state, arrived, now, context)
        moving = [lane for lane in self.lanes if lane.has_gradient]
        sent = [
            self.device.send(
                gradient, [(b, a) for a, b in lane.pairs(self.program.num_devices)], context
            )
            for lane, gradient in zip(moving, pulled.arrived_gradients, strict=True)
        ]
        state = state._replace(
            gradients=store(state.gradients, now["gradient_arrival"], sent),
            accumulators=list(pulled.accumulators),
        )
        stage = now["backward_chunk"] * self.program.num_devices + self.device.index
        # Both halves of a zero-bubble backward make the outputs; they count once.
        is_first_half = now["backward_kind"] != BACKWARD_KINDS.index("W")
        return self._add_outputs(
            state, pulled.outputs, jnp.where(is_first_half, stage, -1), context, None
        )

    @jax.named_scope("backward")
    def _run_backward(
        self,
        state: TickState,
        arrived: list[Any],
        now: dict[str, Any],
        context: MicrobatchContext,
    ) -> StageGradients:
        stashed = load(state.stash, now["stash_read"])
        is_sent = now["gradient_read"] >= 0  # nothing comes back to the last stage
        gradients = [jnp.where(is_sent, g, jnp.zeros_like(g)) for g in arrived]

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
        # an index for (chunk, kind); negative where the device has no backward
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
                self.options.roles, state.outputs, made, self.device.wiring.outputs, strict=True
            )
        ]
        return state._replace(outputs=outputs)

    def _no_outputs(self) -> list[Any]:
        return [zeros_of(self.program.output_aval(p)) for p in range(len(self.options.roles))]

    def _vjp(self, chunk: int, context: MicrobatchContext, slots: list[Any]) -> StageVjp:
        backward = self.options.backward
        assert backward is not None
        device = self.device.of_chunk(chunk)
        layout = self.options.layout
        masks = self.runs_bubbles
        if layout is None:
            return Recomputing(device, context, slots, backward.seed, masks=masks)
        return Storing(device, context, slots, backward.seed, layout, masks=masks)

    def _is_conditional(self, alternatives: Sized) -> bool:
        """True if idle devices branch around all alternatives instead of computing and masking."""
        backward = self.options.backward
        return len(alternatives) > 1 or (backward is not None and backward.skips_bubbles)

    def _run[T](
        self,
        runs: dict[int, Callable[[T], T]],
        code: Any,
        context: MicrobatchContext,
        idle: T,
    ) -> T:
        """Run the alternative of this code. Results of bubbles are arbitrary: callers mask them."""
        backward = self.options.backward
        if backward is None:  # differentiable
            return run_selected(runs, jnp.clip(code, 0), idle, "switch", range(len(runs)))
        if not self._is_conditional(runs):
            (run,) = runs.values()
            return run(idle)
        active = jnp.where(context.is_active, code, -1)  # -1 matches no alternative
        return run_selected(runs, active, idle, "at_most_once", range(-1, max(runs) + 1))


def occurring(*tables: np.ndarray) -> list[tuple[int, ...]]:
    """The combinations of entries that occur where a device is not idle."""
    columns = np.stack([table.ravel() for table in tables], axis=1)  # [ticks * devices, tables]
    return [tuple(map(int, row)) for row in np.unique(columns[columns[:, 0] >= 0], axis=0)]
