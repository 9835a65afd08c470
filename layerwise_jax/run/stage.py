"""One device's view of a pipeline: what its stage reads, runs and sends, for one microbatch.

Random keys are held and sent as their data; `to_wire` and `from_wire` turn them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from layerwise_jax.mesh import STAGE
from layerwise_jax.run.wire import _key, choose, fill, from_wire, to_wire, wire_aval
from layerwise_jax.stage.staged_program import StagedProgram
from layerwise_jax.stage.wiring import (
    FromBody,
    FromBranch,
    FromConstant,
    FromInput,
    FromLane,
    Source,
)
from layerwise_jax.trace.program import BatchSlice, Op, Operand, Value, evaluate


class StageResults(NamedTuple):
    """What a stage made: results of its body and of its branch, and its slots with new state."""

    body: Mapping[int, Any]
    branch: Sequence[Any]
    slots: list[Any]

    def made(self, source: FromBody | FromBranch) -> Any:
        return (self.body if isinstance(source, FromBody) else self.branch)[source.result]


class MicrobatchContext:
    """A microbatch that a device works on; outside 0..M-1 the device idles, and `is_active` is
    false.
    """

    def __init__(self, device: LocalStage, microbatch: Any):
        loop = device.loop
        self.device = device
        self.is_active = (microbatch >= 0) & (microbatch < loop.num_microbatches)
        self.index = jnp.clip(microbatch, 0, loop.num_microbatches - 1)
        self.rows = BatchSlice(device.replica * loop.num_microbatches + self.index)

    def input(self, j: int) -> Any:
        """Input leaf j of this microbatch."""
        array = self.device.inputs[j]
        if self.device.loop.in_axes[j] is None:
            return array
        return lax.dynamic_index_in_dim(array, self.index, 0, keepdims=False)

    def gate(self, values: Mapping[Value, Any]) -> dict[Value, Any]:
        """The same values; while the device idles their gradients are zero, whatever comes back."""
        if not self.device.gates:
            return dict(values)
        inexact = {x: v for x, v in values.items() if jnp.issubdtype(v.dtype, jnp.inexact)}
        return {**values, **_gate(self.is_active, inexact)}


@jax.custom_jvp
def _gate(is_active: Any, values: dict[Value, Any]) -> dict[Value, Any]:
    del is_active
    return values


@_gate.defjvp
def _gate_jvp(primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    is_active, values = primals
    return values, jax.tree.map(lambda x: jnp.where(is_active, x, jnp.zeros_like(x)), tangents[1])


class LocalStage:
    """A pipeline's stage on this device, inside `shard_map`.

    Attributes:
      loop: stages, alignment, wiring and placement.
      inputs: every input leaf: (microbatches, ...) where it is split, whole otherwise.
      replica: this device's index on the data axis.
      gates: whether JAX is to differentiate the loop, so that gradients must be kept out of
        bubbles.
      chunk: which of the device's stages this is.
      index: this device's index on the axis of the stages.
      stage: this device's stage of that chunk.
    """

    def __init__(
        self, loop: StagedProgram, inputs: list[Any], replica: Any, *, gates: bool, chunk: int = 0
    ):
        self.loop, self.inputs, self.replica, self.gates, self.chunk = (
            loop,
            inputs,
            replica,
            gates,
            chunk,
        )
        self.program, self.wiring = loop.program, loop.wiring
        self.index = lax.axis_index(STAGE)
        self.stage = chunk * loop.num_devices + self.index

    def of_chunk(self, chunk: int) -> LocalStage:
        """Another stage of the same device."""
        return LocalStage(self.loop, self.inputs, self.replica, gates=self.gates, chunk=chunk)

    @property
    def stages(self) -> range:
        """The stages of this chunk, one a device."""
        first = self.chunk * self.loop.num_devices
        return range(first, first + self.loop.num_devices)

    @property
    def body_slots(self) -> Sequence[int]:
        """The slots of the common body's weights."""
        return self.loop.placement.body_slots[self.chunk]

    def switch(self, branches: Sequence[Callable], *operands: Any) -> Any:
        """What the branch of this device's stage returns, given one for each stage of the chunk."""
        return (
            branches[0](*operands)
            if len(branches) == 1
            else lax.switch(self.index, branches, *operands)
        )

    def run_stage(
        self,
        moment: MicrobatchContext,
        arrived: list[Any],
        slots: list[Any],
        late: tuple[MicrobatchContext, list[Any]] | None = None,
    ) -> StageResults:
        """Run the stage: its branch, then the common body.

        Args:
          moment: the microbatch.
          arrived: what came over each lane.
          slots: this stage's row of every slot.
          late: for `after`, which runs a tick behind its body: its microbatch, and what was kept
            for it. None leaves `after` out, with zeros for what it makes.
        """
        branch, slots_after = self._run_branch(moment, arrived, slots, late)
        if not self.loop.has_body:
            return StageResults({}, branch, slots_after)
        values = [*(slots[j] for j in self.body_slots), *self.body_reads(moment, arrived, branch)]
        return StageResults(self.run_body(moment, values), branch, slots_after)

    def run_before(
        self, moment: MicrobatchContext, arrived: list[Any], slots: list[Any]
    ) -> list[Any]:
        """The results of the branch alone, as they stand before the body; zeros for what `after`
        makes.
        """
        return self._run_branch(moment, arrived, slots, None)[0]

    def run_body(
        self, moment: MicrobatchContext, values: Sequence[Any], state: Collection[int] = ()
    ) -> dict[int, Any]:
        """The results of the common body that anything uses, given its weights and then its reads.

        `state` are results besides, which are new state.
        """
        shape, alignment = self.loop.alignment.parts[0].shape, self.loop.alignment
        env = moment.gate(dict(zip((*shape.weights, *shape.reads), values, strict=True)))
        env.update((value, jnp.asarray(table)[self.stage]) for value, table in alignment.varying)
        results = sorted({*self.wiring.body_results, *state})
        wanted = [shape.made[j] for j in results]
        return dict(zip(results, evaluate(alignment.body, env, wanted, moment.rows), strict=True))

    def body_reads(
        self, moment: MicrobatchContext, arrived: list[Any], branch: Sequence[Any]
    ) -> list[Any]:
        """What the body reads, in the order in which it reads it."""
        return [
            self._body_read(source, moment, arrived, branch) for source in self.wiring.body_reads
        ]

    def _body_read(
        self, source: Source, moment: MicrobatchContext, arrived: list[Any], branch: Sequence[Any]
    ) -> Any:
        match source:
            case FromInput(j):
                return moment.input(j)
            case FromConstant(value):
                return jnp.asarray(self.program.constants[value])
            case FromLane(lane, first):
                came = from_wire(arrived[lane], self.wiring.lanes[lane].aval)
                if 0 not in self.stages:
                    return came
                return choose(
                    self.stage == 0, self._body_read(first, moment, arrived, branch), came
                )
            case FromBranch(result):
                return branch[result]
        raise AssertionError(f"a body cannot read {source}")

    def _run_branch(
        self,
        moment: MicrobatchContext,
        arrived: list[Any],
        slots: list[Any],
        late: tuple[MicrobatchContext, list[Any]] | None,
    ) -> tuple[list[Any], list[Any]]:
        """This stage's own operations: results in the order of the wiring, and the slots with new
        state.
        """
        if not self.wiring.needs_branch:
            return [], slots
        results, state = self.switch(
            [partial(self._branch_of, s, moment, arrived, slots, late) for s in self.stages]
        )
        results = [
            from_wire(x, aval)
            for x, (aval, _) in zip(results, self.wiring.branch_results, strict=True)
        ]
        return results, self.with_state(moment, slots, state)

    def with_state(
        self, moment: MicrobatchContext, slots: list[Any], state: Sequence[Any]
    ) -> list[Any]:
        """The slots with new state, unless the device idles."""
        slots = list(slots)
        for j, new in zip(self.loop.state_slots, state, strict=True):
            slots[j] = choose(moment.is_active, from_wire(new, jax.typeof(slots[j])), slots[j])
        return slots

    def _branch_of(
        self,
        s: int,
        moment: MicrobatchContext,
        arrived: list[Any],
        slots: list[Any],
        late: tuple[MicrobatchContext, list[Any]] | None,
    ) -> tuple[list[Any], list[Any]]:
        """The branch of stage s: what precedes its body now, and what follows it a tick late."""
        part = self.loop.alignment.parts[s]
        of_after = {x for op in part.after for x in op.results}
        wanted = [values[s] for _, values in self.wiring.branch_results]
        state = self._new_state(s)
        early = [x for x in [*wanted, *state.values()] if x is not None and x not in of_after]
        known = self.known(moment, s, slots) | moment.gate(self.arrived_values(s, arrived))
        made = dict(
            zip(map(_key, early), self.evaluate(part.before, known, early, moment), strict=True)
        )
        if part.after and late is not None:
            then, kept = late
            known = self.known(then, s, slots) | then.gate(self._kept_values(kept))
            due = [x for x in wanted if x is not None and x in of_after]
            made.update(
                zip(map(_key, due), self.evaluate(part.after, known, due, then), strict=True)
            )
        results = [
            to_wire(made[_key(x)])
            if x is not None and _key(x) in made
            else fill(wire_aval(aval), 0.0)
            for (aval, _), x in zip(self.wiring.branch_results, wanted, strict=True)
        ]
        return results, [
            to_wire(made[_key(state[j])] if j in state else slots[j]) for j in self.loop.state_slots
        ]

    def _new_state(self, s: int) -> dict[int, Operand]:
        """The values that stage s gives to the slots of its state."""
        slot_of = self.loop.placement.slot_of(s)
        outputs = self.loop.stages[s].outputs.items()
        return {slot_of[self.loop.state[p]]: x for p, x in outputs if p in self.loop.state}

    def known(self, moment: MicrobatchContext, s: int, slots: list[Any]) -> dict[Value, Any]:
        """Weights, inputs and constants of stage s, by value."""
        stage, slot_of = self.loop.stages[s], self.loop.placement.slot_of(s)
        weights = moment.gate({x: slots[slot_of[weight]] for x, weight in stage.weights.items()})
        return {**self.given(moment, s), **weights}

    def given(self, moment: MicrobatchContext, s: int) -> dict[Value, Any]:
        """Inputs and constants of stage s, by value."""
        read = set(self.loop.stages[s].inputs)
        inputs = {x: moment.input(j) for j, x in enumerate(self.program.inputs) if x in read}
        return {**self.program.constants, **inputs}

    def arriving(self, s: int) -> dict[Value, int]:
        """The lane of every value that comes to stage s."""
        values = [lane.values[s - 1] if s else None for lane in self.wiring.lanes]
        return {x: j for j, x in enumerate(values) if x is not None}

    def arrived_values(self, s: int, arrived: list[Any]) -> dict[Value, Any]:
        """What came over the lanes to stage s, by value."""
        return {
            x: from_wire(arrived[j], self.wiring.lanes[j].aval) for x, j in self.arriving(s).items()
        }

    def state_after(
        self, s: int, moment: MicrobatchContext, arrived: list[Any], slots: list[Any]
    ) -> list[Any]:
        """The state slots once stage s has run, as they are held."""
        state = self._new_state(s)
        known = {**self.known(moment, s, slots), **self.arrived_values(s, arrived)}
        made = self.evaluate(
            self.loop.alignment.parts[s].before, known, list(state.values()), moment
        )
        new = dict(zip(state, made, strict=True))
        return [to_wire(new.get(j, slots[j])) for j in self.loop.state_slots]

    def _kept_values(self, kept: list[Any]) -> dict[Value, Any]:
        avals = self.program.avals
        return {x: from_wire(v, avals[x]) for (x, _), v in zip(self.wiring.kept, kept, strict=True)}

    def evaluate(
        self,
        ops: Sequence[Op],
        known: Mapping[Value, Any],
        wanted: Sequence[Operand],
        moment: MicrobatchContext,
    ) -> list[Any]:
        return evaluate(ops, known, wanted, moment.rows)

    def send(self, value: Any, pairs: list[tuple[int, int]], moment: MicrobatchContext) -> Any:
        """Move a value between just these pairs of stages; an idle stage sends what bubbles compute
        on.
        """
        value = to_wire(value)
        value = jnp.where(moment.is_active, value, fill(jax.typeof(value), self.loop.bubble_fill))
        return lax.ppermute(value, STAGE, pairs)
