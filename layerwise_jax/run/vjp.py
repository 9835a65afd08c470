"""One stage's forward for one microbatch, and its backward, part by part from the end.

The VJP of a segment is taken under a condition that only its stage enters, so that each stage has
separate residuals. Two residual policies implement `StageVjp`: see `residual_policies`.

    forward    before -> body                         (stashes; sends results over lanes)
    backward   after (forward and VJP) -> VJP of body -> VJP of before
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layerwise_jax.run.linearize import gradients_of, linearize_segment
from layerwise_jax.run.microbatch import MicrobatchContext
from layerwise_jax.run.segment import (
    StageSegment,
    empty_results,
    put_results,
    segment_after_body,
    segment_before_body,
)
from layerwise_jax.run.stage import LocalStage, StageResults
from layerwise_jax.run.wire import from_wire, to_wire, zeros_of
from layerwise_jax.schedule.table import ActionKind
from layerwise_jax.stage.wiring import FromBody, FromBranch, FromLane, Source
from layerwise_jax.trace.derivative import cotangent, is_inexact

# Results of a segment in wire format, cotangents of its reads, gradient accumulators by slot.
SegmentCarry = tuple[list[Any], Any, dict[int, Any]]


class StageGradients(NamedTuple):
    """Results of a stage's backward.

    Attributes:
      arrived_gradients: cotangents of the lanes that arrived, for each lane that has one.
      accumulators: gradients of this device's weights so far, by slot; None for untrained slots.
      outputs: the stage's outputs.
    """

    arrived_gradients: list[Any]
    accumulators: list[Any]
    outputs: list[Any]


class StageVjp:
    """A stage's forward and backward for one microbatch.

    Attributes:
      device: the stage on this device.
      context: the microbatch.
      slots: this device's shard of every slot.
      seed: the cotangent of the loss of one microbatch.
      masks: backward may run in a bubble, whose gradients must not be accumulated.
    """

    def __init__(
        self,
        device: LocalStage,
        context: MicrobatchContext,
        slots: list[Any],
        seed: float,
        *,
        masks: bool,
    ):
        self.device = device
        self.context = context
        self.slots = slots
        self.seed = seed
        self.masks = masks
        self.loop = device.loop
        self.wiring = device.loop.wiring
        self.arrived: list[Any] = []

    def forward(self, arrived: list[Any]) -> tuple[StageResults, list[Any]]:
        """Run the stage.

        Args:
          arrived: the value of each lane, in wire format.

        Returns:
          The stage's results; the values to stash, in wire format.
        """
        raise NotImplementedError

    def _restore(self, stashed: list[Any]) -> tuple[Callable | None, StageResults | None]:
        """The body's VJP function, or None without a body; the stage's results.

        The results are None if the VJP of the segment before the body computes them.
        """
        raise NotImplementedError

    def _with_residuals(self, s: int, vjp_fn: Callable) -> Callable:
        """The VJP function of the segment before stage s's body, with the stashed residuals."""
        raise NotImplementedError

    def backward(
        self,
        stashed: list[Any],
        gradients: Sequence[Any],
        accumulators: Sequence[Any],
        kind: ActionKind,
    ) -> StageGradients:
        """Propagate the cotangents of the loss and of sent values through the stage.

        Args:
          stashed: the values that `forward` stashed.
          gradients: cotangents of the sent values, for each lane that has one.
          accumulators: gradients of this device's weights so far, None for untrained slots.
          kind: "B" for all gradients, "I" for those of arrived values, "W" for those of weights.
        """
        self.kind = kind
        self.accumulators = list(accumulators)
        self.body_cotangents: dict[int, Any] = {}
        self.branch_cotangents: dict[int, Any] = {}
        self._seed_results(gradients)
        body_vjp, results = self._restore(stashed)
        # From the end of the stage to its start: a part adds to the cotangents of the one before.
        late = self._backward_after(results)
        if body_vjp is not None:
            self._backward_body(body_vjp)
        own = self._backward_before(with_results=results is None)
        if results is None:
            results = StageResults({}, own, self.slots)
        outputs = [
            late[output.source.result] if output.lag else results.made(output.source)
            for output in self.wiring.outputs
        ]
        arrived_gradients = [self.lane_cotangents[j] for j in sorted(self.lane_cotangents)]
        return StageGradients(arrived_gradients, self.accumulators, outputs)

    def _seed_results(self, gradients: Sequence[Any]) -> None:
        """Start from the cotangents of sent values, and from the loss where it has no lag."""
        moving = [j for j, lane in enumerate(self.wiring.lanes) if lane.has_gradient]
        zeros = [jnp.zeros_like(gradient) for gradient in gradients]
        self.lane_cotangents = dict(zip(moving, zeros, strict=True))
        for j, gradient in zip(moving, gradients, strict=True):
            self._add(self.wiring.lanes[j].source, gradient)
        loss = self.wiring.outputs[0]
        if loss.lag == 0:
            seed = self._seed()
            # all devices run this line; the loss is of one stage
            mine = jnp.where(self.device.stage == loss.stage, seed, jnp.zeros_like(seed))
            self._add(loss.source, mine)

    def _seed(self) -> Any:
        """The cotangent of the first output, the loss; other outputs have none."""
        loss = self.loop.output_aval(0)
        return jnp.full(loss.shape, self.seed, loss.dtype)

    def _add(self, source: FromBody | FromBranch, gradient: Any) -> None:
        """Add to the cotangent of a result."""
        is_body = isinstance(source, FromBody)
        into = self.body_cotangents if is_body else self.branch_cotangents
        r = source.result
        into[r] = into[r] + gradient if r in into else gradient

    def _accumulators_of(self, slots: Iterable[int]) -> dict[int, Any]:
        return {j: self.accumulators[j] for j in slots}

    def _put_accumulators(self, accumulators: Mapping[int, Any]) -> None:
        for j, x in accumulators.items():
            self.accumulators[j] = x

    def _accumulated(
        self, accumulators: dict[int, Any], gradients: dict[int, Any]
    ) -> dict[int, Any]:
        """Some accumulators with gradients added, both by slot; unchanged in a bubble."""
        added = dict(accumulators)
        if self.kind != "I":
            for j, gradient in gradients.items():
                so_far = accumulators[j]
                added[j] = so_far + gradient.astype(so_far.dtype)
                if self.masks:  # a bubble's gradient may be NaN: no product with 0 would do
                    added[j] = jnp.where(self.context.is_active, added[j], so_far)
        return added

    def _gradients(
        self, vjp_fn: Callable, cotangents: Any, weights: Mapping[Any, Any]
    ) -> dict[Any, Any]:
        """Gradients by key; those of weights in float32 where they are accumulated."""
        return gradients_of(vjp_fn, cotangents, {} if self.kind == "I" else weights)

    def _backward_body(self, vjp_fn: Callable) -> None:
        """Propagate the cotangents of the body's results to its weights and reads."""
        made = self.loop.alignment.parts[0].shape.made
        avals = {j: self.loop.program.avals[made[j]] for j in self.wiring.body_results}
        # Results of the body that this stage does not use have a cotangent of zeros.
        cotangents = {j: cotangent(aval, self.body_cotangents.get(j)) for j, aval in avals.items()}
        slots = self.device.body_slots
        weights = {j: self.slots[slot] for j, slot in enumerate(slots)}
        gradients = self._gradients(vjp_fn, cotangents, weights)
        # positions: weights of the body first, then its reads
        of_weights = {slots[j]: gradient for j, gradient in gradients.items() if j < len(slots)}
        self._put_accumulators(self._accumulated(self._accumulators_of(of_weights), of_weights))
        for j, gradient in gradients.items():
            if j >= len(slots):
                self._backward_read(self.wiring.body_reads[j - len(slots)], gradient)

    def _backward_read(self, source: Source, gradient: Any) -> None:
        """Propagate the cotangent to the producer of this body input.

        Stage 0 reads `first` in place of a lane, so the cotangent goes to both: the lane's is sent
        to no one on stage 0, and no other stage has a result `first`. Inputs have no cotangent.
        """
        if isinstance(source, FromLane):
            if self.kind != "W":
                self.lane_cotangents[source.lane] = self.lane_cotangents[source.lane] + gradient
            source = source.first
        if isinstance(source, FromBranch):
            self._add(source, gradient)

    def _backward_after(self, results: StageResults | None) -> dict[int, Any]:
        """Forward and VJP of the last stage's `after`.

        Returns:
          Branch results of `after`, by index; zeros on devices without the last stage.
        """
        segment = segment_after_body(self.loop)
        if segment.is_empty:
            return {}
        assert results is not None, "nothing follows the body of stages without a body"
        kept = {x: results.made(source) for x, source in self.wiring.kept}

        def on_last(carry: SegmentCarry) -> SegmentCarry:
            reads = {**kept, **segment.old_state(self.slots)}
            made, vjp_fn = linearize_segment(
                self.device, segment, self.context, segment.weights(self.slots), reads
            )
            loss = self.wiring.outputs[0]
            # in the order of segment.results
            seeds = [
                self._seed() if loss.lag and r == loss.source.result else None
                for r in segment.results
            ]
            gradients, accumulators = self._vjp_of_segment(segment, made, vjp_fn, seeds, carry[2])
            of_kept = [gradients[x] for x, v in kept.items() if is_inexact(v)]
            return [to_wire(x) for x in made], of_kept, accumulators

        avals = [self.wiring.branch_results[r][0] for r in segment.results]
        start: SegmentCarry = (
            [zeros_of(aval) for aval in avals],
            [jnp.zeros_like(x) for x in kept.values() if is_inexact(x)],
            self._accumulators_of(segment.trained.values()),
        )
        runs = {segment.stage: on_last}
        made, of_kept, accumulators = self.device.run_segments(runs, start, "at_most_once")
        self._put_accumulators(accumulators)
        moving = [source for x, source in self.wiring.kept if is_inexact(kept[x])]
        for source, gradient in zip(moving, of_kept, strict=True):
            self._add(source, gradient)
        values = [from_wire(x, aval) for x, aval in zip(made, avals, strict=True)]
        return dict(zip(segment.results, values, strict=True))

    def _backward_before(self, with_results: bool) -> list[Any]:
        """VJP of the segments before the body, each on its own stage.

        Returns:
          The branch results, or nothing if not `with_results`.
        """
        segments = [segment_before_body(self.loop, s) for s in self.device.stages]
        # Accumulators are part of the carry, so that a loop of one iteration adds in place.
        start: SegmentCarry = (
            empty_results(self.loop) if with_results else [],
            {j: jnp.zeros_like(x) for j, x in self.lane_cotangents.items()},
            self._accumulators_of({j for segment in segments for j in segment.trained.values()}),
        )
        runs = {
            segment.stage: partial(self._backward_segment, segment, with_results)
            for segment in segments
            if segment.results
        }
        carry = self.device.run_segments(runs, start, "at_most_once")
        # of_lanes: beside the cotangents that went through the body
        results, of_lanes, accumulators = carry
        self._put_accumulators(accumulators)
        for j, gradient in of_lanes.items():
            self.lane_cotangents[j] = self.lane_cotangents[j] + gradient
        return self.device.from_results(results) if with_results else []

    def _backward_segment(
        self, segment: StageSegment, with_results: bool, carry: SegmentCarry
    ) -> SegmentCarry:
        """VJP of the segment before one stage's body."""
        results, zeros, accumulators = carry  # zeros: a cotangent for every differentiable lane
        s = segment.stage
        reads = {
            **self.device.arrived_values(s, self.arrived),
            **segment.old_state(self.slots),
        }
        weights = segment.weights(self.slots)
        made, traced = linearize_segment(self.device, segment, self.context, weights, reads)
        vjp_fn = self._with_residuals(s, traced)
        seeds = [self.branch_cotangents.get(r) for r in segment.results]
        gradients, accumulators = self._vjp_of_segment(segment, made, vjp_fn, seeds, accumulators)
        value_of = {j: x for x, j in self.device.arriving(s).items()}  # lane -> value
        of_lanes = {
            j: gradients[value_of[j]] if value_of.get(j) in gradients and self.kind != "W" else zero
            for j, zero in zeros.items()
        }
        if with_results:
            results = put_results(results, dict(zip(segment.results, made, strict=True)))
        return results, of_lanes, accumulators

    def _vjp_of_segment(
        self,
        segment: StageSegment,
        made: Sequence[Any],
        vjp_fn: Callable,
        seeds: Sequence[Any],
        accumulators: dict[int, Any],
    ) -> tuple[dict[Any, Any], dict[int, Any]]:
        """Gradients by value, and the accumulators with the gradients of the weights added."""
        cotangents = [cotangent(jax.typeof(x), seed) for x, seed in zip(made, seeds, strict=True)]
        weights = {x: self.slots[j] for x, j in segment.trained.items()}
        gradients = self._gradients(vjp_fn, cotangents, weights)
        by_slot: dict[int, Any] = {}
        for x, j in segment.trained.items():
            # two values may be one weight
            by_slot[j] = by_slot[j] + gradients[x] if j in by_slot else gradients[x]
        return gradients, self._accumulated(accumulators, by_slot)
