"""A stage on its device: the values it reads, runs and sends for one microbatch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from layerwise_jax.mesh import STAGE
from layerwise_jax.run.conditions import BranchPolicy, run_selected
from layerwise_jax.run.microbatch import LateAfter, MicrobatchContext
from layerwise_jax.run.segment import (
    StageSegment,
    empty_results,
    put_results,
    segment_after_body,
    segment_before_body,
)
from layerwise_jax.run.wire import choose, fill, from_wire, to_wire
from layerwise_jax.stage.staged_program import StagedProgram
from layerwise_jax.stage.wiring import (
    FromBody,
    FromBranch,
    FromConstant,
    FromInput,
    FromLane,
    Source,
)
from layerwise_jax.trace.program import Value, evaluate

# Branch results in wire format, and the state slots in wire format.
OwnResults = tuple[list[Any], list[Any]]


class StageResults(NamedTuple):
    """Results of a stage's body and of its branch, and its slots with new state."""

    body: Mapping[int, Any]
    branch: Sequence[Any]
    slots: list[Any]

    def made(self, source: FromBody | FromBranch) -> Any:
        return (self.body if isinstance(source, FromBody) else self.branch)[source.result]


class LocalStage:
    """A pipeline's stage on this device, inside `shard_map`.

    Attributes:
      loop: the staged program.
      inputs: every input leaf: [microbatches, rows, ...] where it is split, else whole.
      replica: int32 scalar, this device's index on the data axis.
      gates: True if JAX differentiates the loop, so that gradients must be kept out of bubbles.
      chunk: which of the device's stages this is.
      recomputes_cheap: VJPs keep only results of expensive ops: see `linearize`.
      index: int32 scalar, this device's index on the stage axis.
      stage: int32 scalar, this device's stage of that chunk.
    """

    def __init__(
        self,
        loop: StagedProgram,
        inputs: list[Any],
        replica: Any,
        *,
        gates: bool,
        recomputes_cheap: bool = False,
    ):
        self.loop = loop
        self.inputs = inputs
        self.replica = replica
        self.gates = gates
        self.chunk = 0
        self.recomputes_cheap = recomputes_cheap
        self.program = loop.program
        self.wiring = loop.wiring
        self.index = lax.axis_index(STAGE)
        self.stage = self.index  # of chunk 0; see `of_chunk`

    def of_chunk(self, chunk: int) -> LocalStage:
        """Another stage of the same device."""
        other = copy(self)
        other.chunk = chunk
        # stages are assigned round-robin
        other.stage = chunk * self.loop.num_devices + self.index
        return other

    @property
    def stages(self) -> range:
        """The stages of this chunk, one a device."""
        first = self.chunk * self.loop.num_devices
        return range(first, first + self.loop.num_devices)

    @property
    def body_slots(self) -> Sequence[int]:
        """The slots of the common body's weights."""
        return self.loop.placement.body_slots[self.chunk]

    def run_segments[T](
        self, runs: Mapping[int, Callable[[T], T]], carry: T, policy: BranchPolicy
    ) -> T:
        """Run this device's stage's entry of `runs`; devices without an entry return the carry.

        Args:
          runs: stage -> function of the carry; stages of other chunks are left out.
          carry: a tree of arrays, whose structure and types the functions keep.
          policy: the price of the condition: see `conditions`.
        """
        own = [s for s in runs if s in self.stages]
        mine = {s: jax.named_scope(f"stage_{s}")(runs[s]) for s in own}
        return run_selected(mine, self.stage, carry, policy, self.stages)

    def run_segment(
        self,
        segment: StageSegment,
        context: MicrobatchContext,
        slots: Sequence[Any],
        reads: Mapping[Value, Any],
    ) -> tuple[dict[int, Any], dict[int, Any]]:
        """Evaluate a segment: (branch results by index, new state by slot).

        Args:
          segment: ops of one stage.
          context: the microbatch.
          slots: this device's shard of every slot.
          reads: values of the microbatch that it reads: arrived, or made by the body.
        """
        known = {**self.known(context, segment.stage, slots), **context.gate(reads)}
        wanted = [*segment.wanted, *segment.state.values()]
        made = evaluate(segment.ops, known, wanted, context.rows)
        results = dict(zip(segment.results, made, strict=False))  # state follows the results
        return results, dict(zip(segment.state, made[len(results) :], strict=True))

    def run_stage(
        self,
        context: MicrobatchContext,
        arrived: list[Any],
        slots: list[Any],
        late: LateAfter | None = None,
    ) -> StageResults:
        """Run the stage: its branch, then the common body.

        Args:
          context: the microbatch.
          arrived: the value of each lane, in wire format.
          slots: this device's shard of every slot.
          late: inputs of `after`, which runs in the same branch; None leaves `after` out, with
            zeros for its results.
        """
        branch, slots_after = self._run_branch(context, arrived, slots, late)
        # The body reads the old state: stages with state have no common body.
        if not self.loop.has_body:
            return StageResults({}, branch, slots_after)
        weights = [slots[j] for j in self.body_slots]
        reads = self.body_reads(context, arrived, branch)
        return StageResults(self.run_body(context, weights, reads), branch, slots_after)

    def run_before(
        self, context: MicrobatchContext, arrived: list[Any], slots: list[Any]
    ) -> list[Any]:
        """The branch results before the body; zeros for those of `after`."""
        return self._run_branch(context, arrived, slots, None)[0]

    def run_after(
        self,
        context: MicrobatchContext,
        results: StageResults,
        slots: list[Any],
        policy: BranchPolicy,
    ) -> dict[int, Any]:
        """Branch results of the last stage's `after`, in wire format, from this tick's body.

        Zeros on devices without the last stage; empty if nothing follows the last body.
        """
        segment = segment_after_body(self.loop)
        nothing = empty_results(self.loop)
        if segment.is_empty:
            return {}
        reads = {x: results.made(source) for x, source in self.wiring.kept}

        def on_last(carry: list[Any]) -> list[Any]:
            del carry
            made, _ = self.run_segment(segment, context, slots, reads)
            return [to_wire(made[r]) for r in segment.results]

        carry = [nothing[r] for r in segment.results]  # on devices without the last stage
        made = self.run_segments({segment.stage: on_last}, carry, policy)
        return dict(zip(segment.results, made, strict=True))

    @jax.named_scope("stage_body")
    def run_body(
        self,
        context: MicrobatchContext,
        weights: Sequence[Any],
        reads: Sequence[Any],
        state: Collection[int] = (),
    ) -> dict[int, Any]:
        """Results of the common body, by index.

        Args:
          context: the microbatch.
          weights: the body's weights.
          reads: the values that it reads.
          state: results that are new state; returned beside those that the wiring uses.
        """
        alignment = self.loop.alignment
        # gate takes a mapping: here by position in [*weights, *reads]
        gated = context.gate(dict(enumerate([*weights, *reads])))
        values = [x for _, x in sorted(gated.items())]
        # literals that differ between stages: this stage's entry of a table [stages, ...]
        varying = [jnp.asarray(table)[self.stage] for table in alignment.varying]
        results = sorted({*self.wiring.body_results, *state})
        first_read = len(weights)
        made = alignment.body(
            values[:first_read], [*values[first_read:], *varying], results, context.rows
        )
        return dict(zip(results, made, strict=True))

    def body_reads(
        self, context: MicrobatchContext, arrived: list[Any], branch: Sequence[Any]
    ) -> list[Any]:
        """The values that the body reads, in its order."""
        return [
            self._body_read(source, context, arrived, branch) for source in self.wiring.body_reads
        ]

    def _body_read(
        self, source: Source, context: MicrobatchContext, arrived: list[Any], branch: Sequence[Any]
    ) -> Any:
        match source:
            case FromInput(j):
                return context.input(j)
            case FromConstant(value):
                return jnp.asarray(self.program.constants[value])
            case FromLane(lane, first):
                received = from_wire(arrived[lane], self.wiring.lanes[lane].aval)
                if 0 not in self.stages:  # later chunks receive on every device
                    return received
                # stage 0 receives nothing: its lanes carry what bubbles send
                own = self._body_read(first, context, arrived, branch)
                return choose(self.stage == 0, own, received)
            case FromBranch(result):
                return branch[result]
        raise AssertionError(f"a body cannot read {source}")

    def _run_branch(
        self,
        context: MicrobatchContext,
        arrived: list[Any],
        slots: list[Any],
        late: LateAfter | None,
    ) -> tuple[list[Any], list[Any]]:
        """Segments of this device's stage: all branch results, and the slots with new state."""
        if not self.wiring.needs_branch:
            return [], slots
        # All stages' branches are compiled on every device; the index picks one.
        runs = {s: partial(self._own, s, context, arrived, slots, late) for s in self.stages}
        start = (empty_results(self.loop), [to_wire(slots[j]) for j in self.loop.state_slots])
        results, state = self.run_segments(runs, start, "switch")
        return self.from_results(results), self.with_state(context, slots, state)

    def _own(
        self,
        s: int,
        context: MicrobatchContext,
        arrived: list[Any],
        slots: list[Any],
        late: LateAfter | None,
        carry: OwnResults,
    ) -> OwnResults:
        """The branch of stage s: `before` for this microbatch, `after` for the one before it."""
        results, state = carry
        segment = segment_before_body(self.loop, s)
        made, new = self.run_segment(segment, context, slots, self.arrived_values(s, arrived))
        results = put_results(results, made)
        slot_numbers = self.loop.state_slots
        state = [to_wire(new.get(j, x)) for j, x in zip(slot_numbers, state, strict=True)]
        # One branch a tick: the last stage's `after` shares it, one microbatch behind.
        if late is not None and s == self.loop.num_stages - 1:
            after = segment_after_body(self.loop)
            made, _ = self.run_segment(after, late.context, slots, self._kept_values(late.kept))
            results = put_results(results, made)
        return results, state

    def from_results(self, results: Sequence[Any]) -> list[Any]:
        """Decode branch results from wire format: random keys from their data."""
        avals = [aval for aval, _ in self.wiring.branch_results]
        return [from_wire(x, aval) for x, aval in zip(results, avals, strict=True)]

    def with_state(
        self, context: MicrobatchContext, slots: list[Any], state: Sequence[Any]
    ) -> list[Any]:
        """The slots with new state (wire format), unless this is a bubble."""
        slots = list(slots)
        for j, new in zip(self.loop.state_slots, state, strict=True):
            slots[j] = choose(context.is_active, from_wire(new, jax.typeof(slots[j])), slots[j])
        return slots

    def known(self, context: MicrobatchContext, s: int, slots: Sequence[Any]) -> dict[Value, Any]:
        """Weights, inputs and constants of stage s, by value."""
        slot_of = self.loop.placement.slot_of(s)
        held = self.loop.stages[s].weights.items()
        weights = context.gate({x: slots[slot_of[weight]] for x, weight in held})
        return {**self.given(context, s), **weights}

    def given(self, context: MicrobatchContext, s: int) -> dict[Value, Any]:
        """Inputs and constants of stage s, by value."""
        read = set(self.loop.stages[s].inputs)
        inputs = {x: context.input(j) for j, x in enumerate(self.program.inputs) if x in read}
        return {**self.program.constants, **inputs}

    def arriving(self, s: int) -> dict[Value, int]:
        """The lane of every value that arrives at stage s."""
        if s == 0:
            return {}
        values = [lane.values[s - 1] for lane in self.wiring.lanes]
        return {x: j for j, x in enumerate(values) if x is not None}

    def arrived_values(self, s: int, arrived: Sequence[Any]) -> dict[Value, Any]:
        """The values that arrived over the lanes at stage s, by value."""
        lanes = self.wiring.lanes
        return {x: from_wire(arrived[j], lanes[j].aval) for x, j in self.arriving(s).items()}

    def _kept_values(self, kept: Sequence[Any]) -> dict[Value, Any]:
        avals = self.program.avals
        return {x: from_wire(v, avals[x]) for (x, _), v in zip(self.wiring.kept, kept, strict=True)}

    @jax.named_scope("send")
    def send(self, value: Any, pairs: list[tuple[int, int]], context: MicrobatchContext) -> Any:
        """Move a value between these pairs of devices; a bubble sends its fill value.

        Returns:
          The value that arrives here, in wire format: zeros on devices that receive nothing.
        """
        value = to_wire(value)
        # A bubble computed on the fill value: its result is masked before anyone uses it.
        value = jnp.where(context.is_active, value, fill(jax.typeof(value), self.loop.bubble_fill))
        return lax.ppermute(value, STAGE, pairs)
