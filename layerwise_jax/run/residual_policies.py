"""Residual policies of a stage's VJP: recompute everything, or store residuals."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from layerwise_jax.run.linearize import linearize_body, result_aval, stashed_sources
from layerwise_jax.run.residuals import StashLayout
from layerwise_jax.run.segment import segment_before_body
from layerwise_jax.run.stage import LocalStage, MicrobatchContext, StageResults
from layerwise_jax.run.vjp import StageVjp
from layerwise_jax.run.wire import fill, from_wire, to_wire, wire_aval
from layerwise_jax.stage.wiring import FromBody


class Recomputing(StageVjp):
    """Stashes what had arrived, and the state that was read; backward runs the stage again."""

    def forward(self, arrived: list[Any]) -> tuple[StageResults, list[Any]]:
        old = [to_wire(self.slots[j]) for j in self.loop.state_slots]
        return self.device.run_stage(self.moment, arrived, self.slots), [*arrived, *old]

    def _again(self, stashed: list[Any]) -> tuple[Callable | None, StageResults | None]:
        self.arrived, old = stashed[: len(self.wiring.lanes)], stashed[len(self.wiring.lanes) :]
        self.slots = list(self.slots)
        for j, x in zip(self.loop.state_slots, old, strict=True):
            self.slots[j] = from_wire(x, jax.typeof(self.slots[j]))
        if not self.loop.has_body:
            return None, None
        branch = self.device.run_before(self.moment, self.arrived, self.slots)
        reads = self.device.body_reads(self.moment, self.arrived, branch)
        body, pull = linearize_body(
            self.device, self.moment, [self.slots[j] for j in self.device.body_slots], reads
        )
        return pull, StageResults(body, branch, self.slots)

    def _restored(self, s: int, pull: Callable) -> Callable:
        del s
        return pull


class Storing(StageVjp):
    """Stashes residuals; backward makes again only what comes from the weights alone."""

    def __init__(
        self,
        device: LocalStage,
        moment: MicrobatchContext,
        slots: list[Any],
        seed: float,
        layout: StashLayout,
    ):
        super().__init__(device, moment, slots, seed)
        self.layout = layout

    def forward(self, arrived: list[Any]) -> tuple[StageResults, list[Any]]:
        slots, rows, own = self.slots, [], []
        if self.wiring.needs_branch:
            rows, state, own = self.device.switch(
                [partial(self._keep_before, s, arrived) for s in self.device.stages]
            )
            slots = self.device.with_state(self.moment, slots, state)
        branch, body, of_body = self._from_rows(rows), {}, []
        if self.layout.body is not None:
            reads = self.device.body_reads(self.moment, arrived, branch)
            weights = [self.slots[j] for j in self.device.body_slots]
            body, pull = linearize_body(self.device, self.moment, weights, reads)
            of_body = self.layout.body.of(pull)
        results = StageResults(body, branch, slots)
        made = [to_wire(results.made(source)) for source in stashed_sources(self.device)]
        return results, [*made, *of_body, *own]

    def _keep_before(self, s: int, arrived: list[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """On stage s: its branch's results, its new state, and its residuals in the buffers that
        stages share.
        """
        piece, asked = segment_before_body(self.device, s)
        reads = {**self.device.arrived_values(s, arrived), **piece.state(self.slots)}
        made, pull = piece.linearize(self.moment, piece.weights(self.slots), reads)
        buffers = [fill(aval, 0.0) for aval in self.layout.own_avals]
        for place, x in zip(self.layout.places[s], self.layout.own[s].of(pull), strict=True):
            buffers[place] = x
        return (
            self._rows(asked, made),
            self.device.state_after(s, self.moment, arrived, self.slots),
            buffers,
        )

    def _again(self, stashed: list[Any]) -> tuple[Callable | None, StageResults | None]:
        made, of_body, self.own = self.layout.split(stashed)
        self.arrived = [fill(wire_aval(lane.aval), 0.0) for lane in self.wiring.lanes]
        branch = self._from_rows(
            [fill(wire_aval(aval), 0.0) for aval, _ in self.wiring.branch_results]
        )
        pull = None
        if self.layout.body is not None:
            reads = self.device.body_reads(self.moment, self.arrived, branch)
            weights = [self.slots[j] for j in self.device.body_slots]
            pull = self.layout.body.put_back(
                linearize_body(self.device, self.moment, weights, reads)[1], of_body
            )
        body: dict[int, Any] = {}
        for source, x in zip(stashed_sources(self.device), made, strict=True):
            into: Any = body if isinstance(source, FromBody) else branch
            into[source.result] = from_wire(x, result_aval(self.device, source))
        return pull, StageResults(body, branch, self.slots)

    def _restored(self, s: int, pull: Callable) -> Callable:
        residuals = self.layout.own[s]
        return residuals.put_back(pull, [self.own[place] for place in self.layout.places[s]])
