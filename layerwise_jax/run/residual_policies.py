"""Residual policies of a stage's VJP: recompute the stage, or stash residuals."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from layerwise_jax.run.linearize import (
    linearize_body,
    linearize_segment,
    result_aval,
    stashed_sources,
)
from layerwise_jax.run.microbatch import MicrobatchContext
from layerwise_jax.run.residuals import StashLayout
from layerwise_jax.run.segment import empty_results, put_results, segment_before_body
from layerwise_jax.run.stage import LocalStage, StageResults
from layerwise_jax.run.vjp import StageVjp
from layerwise_jax.run.wire import from_wire, to_wire, zeros_of
from layerwise_jax.stage.wiring import FromBody

# Branch results, state slots, and stash buffers of a segment, all in wire format.
Kept = tuple[list[Any], list[Any], list[Any]]


class Recomputing(StageVjp):
    """Stashes the arrived values and the old state; backward runs the stage again from there."""

    def forward(self, arrived: list[Any]) -> tuple[StageResults, list[Any]]:
        old_state = [to_wire(self.slots[j]) for j in self.loop.state_slots]
        results = self.device.run_stage(self.context, arrived, self.slots)
        return results, [*arrived, *old_state]

    def _restore(self, stashed: list[Any]) -> tuple[Callable | None, StageResults | None]:
        num_lanes = len(self.wiring.lanes)  # stashed: [*lanes, *state slots]
        self.arrived = stashed[:num_lanes]
        self.slots = list(self.slots)
        for j, x in zip(self.loop.state_slots, stashed[num_lanes:], strict=True):
            self.slots[j] = from_wire(x, jax.typeof(self.slots[j]))
        if not self.loop.has_body:
            return None, None
        # The segment before the body runs twice: here for its results, and in its own VJP, whose
        # residuals would not fit through the condition. XLA merges nothing across conditions.
        branch = self.device.run_before(self.context, self.arrived, self.slots)
        reads = self.device.body_reads(self.context, self.arrived, branch)
        weights = [self.slots[j] for j in self.device.body_slots]
        body, vjp_fn = linearize_body(self.device, self.context, weights, reads)
        return vjp_fn, StageResults(body, branch, self.slots)

    def _with_residuals(self, s: int, vjp_fn: Callable) -> Callable:
        del s
        return vjp_fn  # traced on this microbatch: its residuals are right already


class Storing(StageVjp):
    """Stashes residuals; backward recomputes only residuals that come from weights only."""

    def __init__(
        self,
        device: LocalStage,
        context: MicrobatchContext,
        slots: list[Any],
        seed: float,
        layout: StashLayout,
        *,
        masks: bool,
    ):
        super().__init__(device, context, slots, seed, masks=masks)
        self.layout = layout

    def forward(self, arrived: list[Any]) -> tuple[StageResults, list[Any]]:
        slots = self.slots
        results: list[Any] = []
        of_segment: list[Any] = []
        if self.wiring.needs_branch:
            start: Kept = (
                empty_results(self.loop),
                [to_wire(slots[j]) for j in self.loop.state_slots],
                [zeros_of(aval) for aval in self.layout.own_avals],
            )
            runs = {s: partial(self._forward_before, s, arrived) for s in self.device.stages}
            results, state, of_segment = self.device.run_segments(runs, start, "switch")
            slots = self.device.with_state(self.context, slots, state)
        branch = self.device.from_results(results)
        body: dict[int, Any] = {}
        of_body: list[Any] = []
        if self.layout.body is not None:
            reads = self.device.body_reads(self.context, arrived, branch)
            weights = [self.slots[j] for j in self.device.body_slots]
            body, vjp_fn = linearize_body(self.device, self.context, weights, reads)
            of_body = self.layout.body.of(vjp_fn)
        made = StageResults(body, branch, slots)
        # order of `StashLayout`: results, body, segment
        kept = [to_wire(made.made(source)) for source in stashed_sources(self.device)]
        return made, [*kept, *of_body, *of_segment]

    def _forward_before(self, s: int, arrived: list[Any], start: Kept) -> Kept:
        """On stage s: results of the segment before the body, new state, and residuals."""
        results, state, buffers = start
        segment = segment_before_body(self.loop, s)
        reads = {**self.device.arrived_values(s, arrived), **segment.old_state(self.slots)}
        weights = segment.weights(self.slots)
        made, vjp_fn = linearize_segment(self.device, segment, self.context, weights, reads)
        buffers = list(buffers)  # zeros where another stage has a residual and this one has none
        residuals = self.layout.own[s].of(vjp_fn)
        for place, x in zip(self.layout.places[s], residuals, strict=True):
            buffers[place] = x
        new: dict[int, Any] = {}
        if segment.state:  # has no gradient and is no result of the VJP; XLA merges the equal ops
            _, new = self.device.run_segment(segment, self.context, self.slots, reads)
        slot_numbers = self.loop.state_slots
        return (
            put_results(results, dict(zip(segment.results, made, strict=True))),
            [to_wire(new.get(j, x)) for j, x in zip(slot_numbers, state, strict=True)],
            buffers,
        )

    def _restore(self, stashed: list[Any]) -> tuple[Callable | None, StageResults | None]:
        results, of_body, self.own = self.layout.split(stashed)
        # Zeros in place of the microbatch: only residuals of weights are taken from this trace.
        self.arrived = [zeros_of(lane.aval) for lane in self.wiring.lanes]
        branch = self.device.from_results(empty_results(self.loop))
        vjp_fn = None
        if self.layout.body is not None:
            reads = self.device.body_reads(self.context, self.arrived, branch)
            weights = [self.slots[j] for j in self.device.body_slots]
            _, traced = linearize_body(self.device, self.context, weights, reads)
            vjp_fn = self.layout.body.put_back(traced, of_body)
        body: dict[int, Any] = {}
        for source, x in zip(stashed_sources(self.device), results, strict=True):
            into: Any = body if isinstance(source, FromBody) else branch
            into[source.result] = from_wire(x, result_aval(self.device, source))
        return vjp_fn, StageResults(body, branch, self.slots)

    def _with_residuals(self, s: int, vjp_fn: Callable) -> Callable:
        stashed = [self.own[place] for place in self.layout.places[s]]
        return self.layout.own[s].put_back(vjp_fn, stashed)
