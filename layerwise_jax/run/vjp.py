"""One stage's forward for one microbatch, what that stashes, and the vjp, piece by piece from the
back.

Each piece's vjp is taken by itself, where only its own stage runs it: a stage's residuals are never
another's. What comes out is the gradient of what arrived, and accumulators to which the gradients
of this stage's weights were added.

There are two ways from forward to backward. `Recomputing` stashes what had arrived and runs the
stage again from there. `Storing` stashes the residuals, as far as the function's own
`jax.checkpoint` leaves any (`residuals.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layerwise_jax.run.buffers import do_if
from layerwise_jax.run.segment import StageSegment, segment_after_body, segment_before_body
from layerwise_jax.run.stage import LocalStage, MicrobatchContext, StageResults
from layerwise_jax.run.wire import fill, from_wire, to_wire, wire_aval
from layerwise_jax.schedule.table import ActionKind
from layerwise_jax.stage.wiring import FromBody, FromBranch, FromLane, Source
from layerwise_jax.trace.derivative import cotangent, is_inexact

# What a piece's vjp adds to: results as they are held, gradients of what it read, accumulators by
# slot.
Carry = tuple[list[Any], Any, dict[int, Any]]


class StageGradients(NamedTuple):
    """What a stage's vjp gives: gradients of the lanes that came in, the accumulators, and the
    stage's outputs.
    """

    arrived_gradients: list[Any]
    accumulators: list[Any]
    outputs: list[Any]


class StageVjp:
    """A stage's vjp for one microbatch.

    Attributes:
      device: the stage on this device.
      moment: the microbatch.
      slots: this device's row of every slot.
      seed: the gradient of the loss of one microbatch.
    """

    def __init__(
        self, device: LocalStage, moment: MicrobatchContext, slots: list[Any], seed: float
    ):
        self.device, self.moment, self.slots, self.seed = device, moment, slots, seed
        self.loop, self.wiring = device.loop, device.loop.wiring
        self.arrived: list[Any] = []

    def forward(self, arrived: list[Any]) -> tuple[StageResults, list[Any]]:
        """Run the stage: its results, and what is to be stashed."""
        raise NotImplementedError

    def _again(self, stashed: list[Any]) -> tuple[Callable | None, StageResults | None]:
        """From what was stashed: the body's vjp, or None, and the stage's results.

        Without a body there are no results here either: the vjp of what precedes it computes them.
        """
        raise NotImplementedError

    def _restored(self, s: int, pull: Callable) -> Callable:
        """The vjp of what precedes stage s's body, with the residuals of this microbatch."""
        raise NotImplementedError

    def backward(
        self,
        stashed: list[Any],
        gradients: Sequence[Any],
        accumulators: Sequence[Any],
        kind: ActionKind,
    ) -> StageGradients:
        """Pull the loss, and what came back over the lanes, through the stage.

        Args:
          stashed: what `forward` left.
          gradients: of what the stage sent, for each lane that has one.
          accumulators: gradients of this device's weights so far, None for what has none.
          kind: "B" for all gradients, "I" for those of what arrived alone, "W" for those of weights
            alone.
        """
        self.kind, self.accumulators = kind, list(accumulators)
        self.of_body: dict[int, Any] = {}
        self.of_branch: dict[int, Any] = {}
        self._seed_results(gradients)
        pull_body, results = self._again(stashed)
        late = self._pull_after(results)
        if pull_body is not None:
            self._pull_body(pull_body)
        rows = self._pull_before(with_results=results is None)
        results = results or StageResults({}, rows, self.slots)
        outputs = [
            late[p] if output.lag else results.made(output.source)
            for p, output in enumerate(self.wiring.outputs)
        ]
        return StageGradients(
            [self.of_lanes[j] for j in sorted(self.of_lanes)], self.accumulators, outputs
        )

    def _seed_results(self, gradients: Sequence[Any]) -> None:
        moving = [j for j, lane in enumerate(self.wiring.lanes) if lane.has_gradient]
        self.of_lanes = {j: jnp.zeros_like(g) for j, g in zip(moving, gradients, strict=True)}
        for j, gradient in zip(moving, gradients, strict=True):
            self._add(self.wiring.lanes[j].source, gradient)
        for output, seed in zip(self.wiring.outputs, self._seeds(), strict=True):
            if seed is not None and output.lag == 0:
                self._add(
                    output.source,
                    jnp.where(self.device.stage == output.stage, seed, jnp.zeros_like(seed)),
                )

    def _seeds(self) -> list[Any]:
        """The gradient of the loss with respect to each output: a number for the first, nothing for
        the rest.
        """
        loss = self.loop.output_aval(0)
        return [jnp.full(loss.shape, self.seed, loss.dtype)] + [None] * (
            len(self.wiring.outputs) - 1
        )

    def _add(self, source: FromBody | FromBranch, gradient: Any) -> None:
        into = self.of_body if isinstance(source, FromBody) else self.of_branch
        into[source.result] = into[source.result] + gradient if source.result in into else gradient

    def _some(self, slots: Iterable[int]) -> dict[int, Any]:
        """The accumulators of these slots."""
        return {j: self.accumulators[j] for j in slots}

    def _put(self, accumulators: Mapping[int, Any]) -> None:
        for j, x in accumulators.items():
            self.accumulators[j] = x

    def _accumulated(
        self, accumulators: dict[int, Any], gradients: dict[int, Any]
    ) -> dict[int, Any]:
        """Some accumulators with gradients added, both by slot."""
        added = dict(accumulators)
        if self.kind != "I":
            for j, gradient in gradients.items():
                so_far = accumulators[j]
                added[j] = jnp.where(
                    self.moment.is_active, so_far + gradient.astype(so_far.dtype), so_far
                )
        return added

    def _pull_body(self, pull: Callable) -> None:
        made = self.loop.alignment.parts[0].shape.made
        avals = {j: self.loop.program.avals[made[j]] for j in self.wiring.body_results}
        (gradients,) = pull({j: cotangent(aval, self.of_body.get(j)) for j, aval in avals.items()})
        slots, num_weights = self.device.body_slots, self.loop.num_body_weights
        of_weights = {slots[j]: gradient for j, gradient in gradients.items() if j < num_weights}
        self._put(self._accumulated(self._some(of_weights), of_weights))
        for j, gradient in gradients.items():
            if j >= num_weights:
                self._pull_read(self.wiring.body_reads[j - num_weights], gradient)

    def _pull_read(self, source: Source, gradient: Any) -> None:
        """Hand a gradient on to where the body read the value; what stages do not use of it goes
        nowhere.
        """
        if isinstance(source, FromLane):
            if self.kind != "W":
                self.of_lanes[source.lane] = self.of_lanes[source.lane] + gradient
            source = source.first
        if isinstance(source, FromBranch):
            self._add(source, gradient)

    def _pull_after(self, results: StageResults | None) -> dict[int, Any]:
        """Outputs of what follows the last stage's body; gradients of what it reads, and of its
        weights.
        """
        piece, positions = segment_after_body(self.device)
        if not piece.ops:
            return {}
        avals = [self.loop.output_aval(p) for p in positions]
        if piece.stage not in self.device.stages:
            return {
                p: from_wire(fill(wire_aval(a), 0.0), a)
                for p, a in zip(positions, avals, strict=True)
            }
        assert results is not None
        kept = {x: results.made(source) for x, source in self.wiring.kept}
        seeds = self._seeds()

        def on_last(carry: Carry) -> Carry:
            made, pull = piece.linearize(
                self.moment, piece.weights(self.slots), {**kept, **piece.state(self.slots)}
            )
            gradients, accumulators = self._pull(
                piece, made, pull, [seeds[p] for p in positions], carry[2]
            )
            return (
                [to_wire(x) for x in made],
                [gradients[x] for x, v in kept.items() if is_inexact(v)],
                accumulators,
            )

        outputs = [fill(wire_aval(aval), 0.0) for aval in avals]
        nothing = [jnp.zeros_like(x) for x in kept.values() if is_inexact(x)]
        start = (outputs, nothing, self._some(piece.trained().values()))
        made, of_kept, accumulators = do_if(self.device.stage == piece.stage, on_last, start)
        self._put(accumulators)
        moving = [source for x, source in self.wiring.kept if is_inexact(kept[x])]
        for source, gradient in zip(moving, of_kept, strict=True):
            self._add(source, gradient)
        return {p: from_wire(x, aval) for p, x, aval in zip(positions, made, avals, strict=True)}

    def _pull_before(self, with_results: bool) -> list[Any]:
        """Gradients of what arrived and of the branches' weights; the branches' results, if they
        are asked for.
        """
        pieces = {s: segment_before_body(self.device, s) for s in self.device.stages}
        trained = {j for piece, _ in pieces.values() for j in piece.trained().values()}
        rows = (
            [fill(wire_aval(aval), 0.0) for aval, _ in self.wiring.branch_results]
            if with_results
            else []
        )
        carry = (
            rows,
            {j: jnp.zeros_like(x) for j, x in self.of_lanes.items()},
            self._some(trained),
        )
        for s, (piece, asked) in pieces.items():
            if asked:
                run = partial(self._pull_piece, piece, asked, with_results)
                carry = (
                    run(carry) if len(pieces) == 1 else do_if(self.device.stage == s, run, carry)
                )
        rows, of_lanes, accumulators = carry
        self._put(accumulators)
        for j, gradient in of_lanes.items():
            self.of_lanes[j] = self.of_lanes[j] + gradient
        return self._from_rows(rows) if with_results else []

    def _pull_piece(
        self, piece: StageSegment, asked: Sequence[int], with_results: bool, carry: Carry
    ) -> Carry:
        s = piece.stage
        reads = {**self.device.arrived_values(s, self.arrived), **piece.state(self.slots)}
        made, pull = piece.linearize(self.moment, piece.weights(self.slots), reads)
        seeds = [self.of_branch.get(r) for r in asked]
        gradients, accumulators = self._pull(piece, made, self._restored(s, pull), seeds, carry[2])
        came = {
            j: lane.values[s - 1] if s else None
            for j, lane in enumerate(self.wiring.lanes)
            if j in self.of_lanes
        }
        of_lanes = {
            j: gradients[x]
            if x in gradients and self.kind != "W"
            else jnp.zeros_like(self.of_lanes[j])
            for j, x in came.items()
        }
        return self._rows(asked, made) if with_results else [], of_lanes, accumulators

    def _pull(
        self,
        piece: StageSegment,
        made: Sequence[Any],
        pull: Callable,
        seeds: Sequence[Any],
        accumulators: dict[int, Any],
    ) -> tuple[dict[Any, Any], dict[int, Any]]:
        """Gradients by value, and some accumulators with those of the weights."""
        (gradients,) = pull(
            [cotangent(jax.typeof(x), seed) for x, seed in zip(made, seeds, strict=True)]
        )
        by_slot: dict[int, Any] = {}
        for x, j in piece.trained().items():
            by_slot[j] = by_slot[j] + gradients[x] if j in by_slot else gradients[x]
        return gradients, self._accumulated(accumulators, by_slot)

    def _rows(self, asked: Sequence[int], made: Sequence[Any]) -> list[Any]:
        """All results of a branch in the form in which branches agree: zeros for those that this
        stage has not.
        """
        found = dict(zip(asked, made, strict=True))
        avals = [aval for aval, _ in self.wiring.branch_results]
        return [
            to_wire(found[r]) if r in found else fill(wire_aval(aval), 0.0)
            for r, aval in enumerate(avals)
        ]

    def _from_rows(self, rows: Sequence[Any]) -> list[Any]:
        return [
            from_wire(x, aval)
            for x, (aval, _) in zip(rows, self.wiring.branch_results, strict=True)
        ]
