"""Tick loop of the ring on one device, inside `shard_map`.

In tick t stage s works on group (t - s) mod R of R groups (R is the number of stages, or of groups
if there are more), and the last stage's tokens go to the first. Groups are stored rotated by stage:
place j of stage s holds group (j - s) mod R, so that in tick t every device uses place t mod R. A
round unrolls R ticks, and every place is an array by itself: no cache is sliced, copied or moved.

    tick              0    1    2    3    4    5        place = tick mod 3
    stage 0         g0   g1   g2   g0   g1   g2
    stage 1          .   g0   g1   g2   g0   g1
    stage 2          .    .   g0   g1   g2   g0         its token is at stage 0 in the next tick

The first round fills the ring and one after the last drains it; stages without a group idle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax.numpy as jnp
from jax import lax

from layerwise_jax.decode.message import Message
from layerwise_jax.decode.step import StepProgram
from layerwise_jax.decode.transport import Transport
from layerwise_jax.decode.values import Carry, Prompts, RingState, Slots
from layerwise_jax.run.conditions import BranchPolicy, run_if, select
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
from layerwise_jax.stage.staged_program import StagedProgram


class TokenContext(MicrobatchContext):
    """Inputs of a stage in one tick: tokens, positions and keys of its group."""

    def __init__(self, inputs: Sequence[Any]):
        self.inputs, self.is_active, self.rows = inputs, True, None

    def input(self, j: int) -> Any:
        return self.inputs[j]

    def gate(self, values: Any) -> dict[Any, Any]:
        return dict(values)


@dataclass(frozen=True, eq=False)
class RingLoop:
    """Configuration of the ring's tick loop; `run` traces it on one device.

    Attributes:
      step: the step's stages.
      num_groups: groups of sequences in flight.
      selects: whether all devices run what only some stages have, and select; else they branch.
      stop_tokens: tokens that end a sequence.
      pad_token: input of an ended sequence.
      transport: passes a tick's message on.
      rounds_per_iteration: rounds that one iteration of the compiled loop unrolls.
    """

    step: StepProgram
    num_groups: int
    selects: bool
    stop_tokens: tuple[int, ...]
    pad_token: int
    transport: Transport
    rounds_per_iteration: int = 1

    @property
    def loop(self) -> StagedProgram:
        return self.step.loop

    @property
    def length(self) -> int:
        """Ticks of a round, and places of a stage."""
        return max(self.loop.num_stages, self.num_groups)

    @cached_property
    def message(self) -> Message:
        """The arrays that a tick sends."""
        return Message.of(self.loop, self.transport.tokens_ride)

    def run(
        self,
        weights: Sequence[Any],
        places: RingState,
        forced: Any,
        prompts: Prompts | None = None,
        operand: Any = None,
    ) -> tuple[RingState, Any]:
        """Run rounds of the ring, each of which gives every group a token.

        Args:
          weights: this device's shard of every slot; those of cache slots are not read.
          places: this device's groups.
          forced: int32[rounds + 1, length, sequences], teacher-forced prompt tokens by the tick in
            which they arrive at the first stage, or -1 to sample.
          prompts: this device's prompts, in a round that reads these instead of one token.
          operand: this device's part of the transport's operand.

        Returns:
          The groups, and int32[rounds + 1, length, sequences]: tokens in the order in which they
          arrive at the first stage. They mean nothing on other stages and where nothing arrived.
        """
        # No microbatches and no gradients: one group a tick, forward only.
        device = LocalStage(self.loop, [], jnp.int32(0), gates=False)
        carry = Carry(places, [zeros_of(x) for x in self.message.avals])
        ring = _Round(self, device, list(weights), prompts, operand)
        arrived = []
        for phase, rounds in (
            ("fill", forced[:1]),
            ("steady", forced[1:-1]),
            ("drain", forced[-1:]),
        ):
            if rounds.shape[0]:
                # Unrolled rounds share the overhead of an iteration, at the price of compile time.
                unroll = min(self.rounds_per_iteration, len(rounds))
                carry, tokens = lax.scan(partial(ring.run, phase), carry, rounds, unroll=unroll)
                arrived.append(tokens)
        return carry.places, jnp.concatenate(arrived)


class _Round:
    """The ticks of a round on one device."""

    def __init__(
        self,
        ring: RingLoop,
        device: LocalStage,
        weights: list[Any],
        prompts: Prompts | None,
        operand: Any,
    ):
        self.ring, self.device, self.weights, self.prompts = ring, device, weights, prompts
        self.loop, self.length = ring.loop, ring.length
        self.message = ring.message
        self.operand = operand

    def run(self, phase: str, carry: Carry, forced: Any) -> tuple[Carry, Any]:
        """One round: the carry, and int32[length, sequences], the tokens that arrived."""
        arrived = []
        for j in range(self.length):
            tokens, carry = self._receive(phase, j, carry, forced[j])
            arrived.append(tokens)
            if phase != "drain" or j < self.loop.num_stages - 1:
                carry = self._tick(phase, j, carry)
        return carry, jnp.stack(arrived)

    def _receive(self, phase: str, j: int, carry: Carry, forced: Any) -> tuple[Any, Carry]:
        """Store the token that the last stage sent in the tick before, unless one is forced."""
        places = carry.places
        # The last stage finished this group one tick ago; at stage 0 the group has this place.
        sender = (j - self.loop.num_stages) % self.length
        if (phase == "fill") == (j < self.loop.num_stages) and phase != "steady":
            return places.tokens[sender], carry  # the ring is not full yet, or drained
        if self.prompts is not None:  # a group that reads nothing keeps its tokens
            forced = jnp.where(self.prompts.lengths[sender].any(), forced, places.tokens[sender])
        # bool[sequences]; an ended sequence goes on with padding until the host replaces it.
        done = places.done[sender]
        tokens = jnp.where(done, self.ring.pad_token, self.message.tokens(carry.arrived))
        # A prompt's own tokens do not end a sequence, so forced ones are left out below.
        is_stop = jnp.zeros_like(done)
        for stop in self.ring.stop_tokens:
            is_stop |= tokens == stop
        tokens = jnp.where(forced >= 0, forced, tokens)
        places = places._replace(
            tokens=_with(places.tokens, sender, tokens),
            done=_with(places.done, sender, done | (is_stop & (forced < 0))),
        )
        return tokens, carry._replace(places=places)

    def _tick(self, phase: str, j: int, carry: Carry) -> Carry:
        """Run the stage for the group at place j, and exchange messages."""
        places = carry.places
        active = self._is_active(phase, j)
        if self.prompts is None:
            tokens, positions = places.tokens[j], places.positions[j]
            next_positions = positions + 1
        else:  # tokens [sequences, length]; position n follows a prompt of length n
            tokens, positions = self.prompts.tokens[j], self.prompts.lengths[j]
            next_positions = positions
        moment = TokenContext([tokens, positions, places.keys[j]])

        def run(state: Any) -> Any:
            _, caches = state
            return self._run_stage(moment, carry.arrived, caches)

        # An idle device sends zeros and keeps its cache.
        idle = ([zeros_of(x) for x in self.message.avals], places.caches[j])
        made, caches = run(idle) if active is None else run_if(active, run, idle)
        positions = (
            next_positions
            if active is None
            else jnp.where(active, next_positions, places.positions[j])
        )
        places = places._replace(
            caches=_with(places.caches, j, caches), positions=_with(places.positions, j, positions)
        )
        arrived = self.ring.transport.exchange(
            made, self.message.pairs, self.operand, carry.arrived
        )
        return Carry(places, arrived)

    def _is_active(self, phase: str, j: int) -> Any:
        """bool: this device has a group in this tick; None if all devices have one."""
        s = self.device.stage
        masks = []
        # In tick j of the first round only stages 0 to j have a group.
        if phase == "fill" and j < self.loop.num_stages - 1:
            masks.append(s <= j)
        # In tick j of the last round stages 0 to j are done.
        if phase == "drain":
            masks.append(s > j)
        if self.prompts is not None:
            masks.append(self.prompts.lengths[j].any())
        if self.ring.num_groups < self.length:
            masks.append((j - s) % self.length < self.ring.num_groups)
        return jnp.stack(masks).all() if masks else None

    def _run_stage(
        self, moment: TokenContext, arrived: list[Any], caches: Slots
    ) -> tuple[list[Any], Slots]:
        """Run the stage for one group: the arrays to send, and the new cache."""
        # Weights and caches by slot; the body takes both alike.
        slots = self._slots(caches)
        branch, caches = self._run_own(moment, self.message.lanes(arrived), caches)
        body: dict[int, Any] = {}
        if self.loop.has_body:
            reads = self.device.body_reads(moment, self.message.lanes(arrived), branch)
            weights = [slots[j] for j in self.device.body_slots]
            body = self.device.run_body(moment, weights, reads, self.ring.step.body_state.values())
            caches = {
                **caches,
                **{j: to_wire(body[r]) for j, r in self.ring.step.body_state.items()},
            }
        results = StageResults(body, branch, slots)
        tokens, caches = self._sample(moment, results, caches)
        made = [results.made(lane.source) for lane in self.loop.wiring.lanes]
        return self.message.pack(made, tokens, self.device), caches

    def _slots(self, caches: Slots) -> list[Any]:
        """Weights and cache, by slot."""
        slots = zip(self.loop.placement.slots, self.weights, strict=True)
        return [
            from_wire(caches[j], slot.aval) if j in caches else held
            for j, (slot, held) in enumerate(slots)
        ]

    def _run_own(
        self, moment: TokenContext, arrived: list[Any], caches: Slots
    ) -> tuple[list[Any], Slots]:
        """Run the segments before the common body: their results, and the cache they leave."""
        runs = {}
        for s in self.device.stages:
            segment = self._with_own_state(segment_before_body(self.loop, s))
            if not segment.is_empty:
                reads = self.device.arrived_values(s, arrived)
                runs[s] = partial(self._run_segment, segment, moment, reads)
        start = (empty_results(self.loop), caches)
        results, caches = self.device.run_segments(runs, start, self._policy)
        return self.device.from_results(results), caches

    def _with_own_state(self, segment: StageSegment) -> StageSegment:
        """The segment with only those caches as state that change and that the body does not."""
        own = self.ring.step.own_state[segment.stage]
        return replace(segment, state={j: x for j, x in segment.state.items() if j in own})

    def _run_segment(
        self,
        segment: StageSegment,
        moment: TokenContext,
        reads: dict[int, Any],
        carry: tuple[list[Any], Slots],
    ) -> tuple[list[Any], Slots]:
        """A segment on its stage: (branch results in wire format, caches) with what it makes."""
        results, caches = carry
        made, new = self.device.run_segment(segment, moment, self._slots(caches), reads)
        return put_results(results, made), {**caches, **{j: to_wire(x) for j, x in new.items()}}

    def _sample(
        self, moment: TokenContext, results: StageResults, caches: Slots
    ) -> tuple[Any, Slots]:
        """int32[sequences] sampled by the last stage (no meaning on others), and the cache."""
        (output,) = self.loop.wiring.outputs
        if not output.lag:
            return results.made(output.source), caches
        after = self._with_own_state(segment_after_body(self.loop))
        # tokens are its only result
        segment = replace(after, results={0: after.results[output.source.result]})
        reads = {x: results.made(source) for x, source in self.loop.wiring.kept}
        run = partial(self._run_segment, segment, moment, reads)
        start = ([zeros_of(self.loop.output_aval(0))], caches)
        if self._policy == "select":  # tokens need no selection: stage 0 reads the last stage's
            (tokens,), held = run(start)
            return tokens, select(self.device.stage == segment.stage, held, caches)
        runs = {segment.stage: run}
        (tokens,), caches = self.device.run_segments(runs, start, self._policy)
        return tokens, caches

    @property
    def _policy(self) -> BranchPolicy:
        return "select" if self.ring.selects else "at_most_once"


def _with(values: Sequence[Any], j: int, value: Any) -> list[Any]:
    """The list with another value at place j."""
    return [*values[:j], value, *values[j + 1 :]]
