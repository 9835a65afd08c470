"""The tick loop of a pipeline, as it runs on one device inside `shard_map`.

In tick t stage s works on microbatch t - s: it runs its branch (if stages differ), the common body, and sends what the
next stage needs. Bubbles (ticks in which a stage has no microbatch) compute on zeros, and what they make is replaced by
zeros before anything uses it, gradients included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from layerwise_jax.alignment import Alignment
from layerwise_jax.placement import STAGE, Placement
from layerwise_jax.program import Program, Rows, Value, Weight, evaluate
from layerwise_jax.stages import Stage
from layerwise_jax.wiring import FromBody, FromBranch, FromConstant, FromInput, FromLane, Output, Source, Wiring


@dataclass(frozen=True, eq=False)
class Loop:
    """What the tick loop is made of.

    Attributes:
      program: the flat program of one microbatch.
      stages, alignment, wiring, placement: the program cut, split, wired and placed.
      num_microbatches: microbatches on each replica.
      in_axes: for every input leaf, 0 if microbatches split it, None if each gets it whole.
      state: for outputs that are new values of weights, which weight.
      bubble_fill: what bubbles compute on; 0, or NaN to prove that nothing leaks out of them.
    """

    program: Program
    stages: tuple[Stage, ...]
    alignment: Alignment
    wiring: Wiring
    placement: Placement
    num_microbatches: int
    in_axes: tuple[int | None, ...]
    state: Mapping[int, Weight]
    bubble_fill: float = 0.0

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    @property
    def num_ticks(self) -> int:
        return self.num_microbatches + self.num_stages - 1 + self.wiring.lag

    def run(self, weights: Sequence[Any], inputs: Sequence[Any], replica: Any) -> tuple[list[Any], list[Any]]:
        """All ticks on this device.

        Args:
          weights: this stage's row of every slot, in the weight's own shape.
          inputs: every input leaf: (microbatches, ...) where it is split, whole otherwise.
          replica: this device's index on the data axis.

        Returns:
          Every output, stacked over microbatches and zero except on the stage that makes it; the slots afterwards,
          which differ from `weights` in what is state.
        """
        stage = lax.axis_index(STAGE)
        ticks = _Ticks(self, list(inputs), stage, replica)
        start = ([_fill(_wire_aval(lane.aval), self.bubble_fill) for lane in self.wiring.lanes], self._kept(), weights)
        (_, _, weights_after), rows = lax.scan(ticks.tick, start, jnp.arange(self.num_ticks, dtype=jnp.int32))
        outputs = [self._collect(output, row, stage) for output, row in zip(self.wiring.outputs, rows, strict=True)]
        return outputs, list(weights_after)

    def _kept(self) -> list[Any]:
        return [_fill(_wire_aval(self.program.avals[x]), self.bubble_fill) for x, _ in self.wiring.kept]

    def _collect(self, output: Output, rows: Any, stage: Any) -> Any:
        """The ticks in which an output appears, zero on the stages that do not make it."""
        start = output.stage + output.lag
        made = lax.slice_in_dim(rows, start, start + self.num_microbatches)
        return made if self.num_stages == 1 else jnp.where(stage == output.stage, made, jnp.zeros_like(made))


class _Ticks:
    """One device's tick, over the loop's static wiring."""

    def __init__(self, loop: Loop, inputs: list[Any], stage: Any, replica: Any):
        self.loop, self.inputs, self.stage, self.replica = loop, inputs, stage, replica
        self.program, self.wiring = loop.program, loop.wiring

    def tick(self, carry: tuple[list, list, list], t: Any) -> tuple[tuple[list, list, list], list]:
        arrived, kept, slots = carry
        now = _Moment(self, t - self.stage)
        lanes = [_unwire(x, lane.aval) for x, lane in zip(arrived, self.wiring.lanes, strict=True)]
        before = [_unwire(x, self.program.avals[value]) for x, (value, _) in zip(kept, self.wiring.kept, strict=True)]
        branch, slots_after = self._branch(now, t, lanes, before, slots)
        body = self._body(now, lanes, branch, slots)
        made = partial(_made, body, branch)
        sent = [self._send(made(lane.source), lane.pairs, now) for lane in self.wiring.lanes]
        kept_after = [_wire(made(source)) for _, source in self.wiring.kept]
        return (sent, kept_after, slots_after), [_wire(made(output.source)) for output in self.wiring.outputs]

    def _send(self, value: Any, pairs: list[tuple[int, int]], now: _Moment) -> Any:
        value = _wire(value)
        value = jnp.where(now.is_active, value, _fill(jax.typeof(value), self.loop.bubble_fill))
        return lax.ppermute(value, STAGE, pairs)

    def _body(self, now: _Moment, lanes: list, branch: list, slots: list) -> dict[int, Any]:
        parts, wiring = self.loop.alignment.parts, self.wiring
        if not wiring.body_results:
            return {}
        shape = parts[0].shape
        env = {x: self._body_read(source, now, lanes, branch) for x, source in zip(shape.reads, wiring.body_reads, strict=True)}
        env.update(zip(shape.weights, slots, strict=False))  # the body's weights stand in the first slots
        env = now.gate(env)
        env.update((value, jnp.asarray(table)[self.stage]) for value, table in self.loop.alignment.varying)
        results = evaluate(self.loop.alignment.body, env, [shape.made[j] for j in wiring.body_results], now.rows)
        return dict(zip(wiring.body_results, results, strict=True))

    def _body_read(self, source: Source, now: _Moment, lanes: list, branch: list) -> Any:
        match source:
            case FromInput(j):
                return now.input(j)
            case FromConstant(value):
                return self.program.constants[value]
            case FromLane(lane, first_input):
                return _choose(self.stage == 0, now.input(first_input), lanes[lane])
            case FromBranch(result):
                return branch[result]
        raise AssertionError(f"a body cannot read {source}")

    def _branch(self, now: _Moment, t: Any, lanes: list, kept: list, slots: list) -> tuple[list, list]:
        """This stage's own operations: results in the order of the wiring, and the slots with new state."""
        if not self.wiring.needs_branch:
            return [], slots
        branches = [partial(self._run_branch, s, t, lanes, kept, slots) for s in range(self.loop.num_stages)]
        if len(branches) == 1:
            results, state = branches[0]()
        else:
            results, state = lax.switch(self.stage, branches)
        results = [_unwire(x, aval) for x, (aval, _) in zip(results, self.wiring.branch_results, strict=True)]
        slots = list(slots)
        for j, new in zip(self._state_slots(), state, strict=True):
            slots[j] = _choose(now.is_active, new, slots[j])
        return results, slots

    def _run_branch(self, s: int, t: Any, lanes: list, kept: list, slots: list) -> tuple[list, list]:
        """The branch of stage s: what precedes its body now, and what follows it a tick late."""
        part, stage = self.loop.alignment.parts[s], self.loop.stages[s]
        late = {x for op in part.after for x in op.results}
        wanted = [values[s] for _, values in self.wiring.branch_results]
        now = _Moment(self, t - s)
        arrived = {v: x for lane, x in zip(self.wiring.lanes, lanes, strict=True) if s and (v := lane.values[s - 1]) is not None}
        known = self._known(now, stage, s, slots) | now.gate(arrived)
        state = {j: x for x, weight in self._state_of(stage) for j in [self.loop.placement.slot_of(s)[weight]]}
        early = [x for x in [*wanted, *state.values()] if x is not None and x not in late]
        results = dict(zip(map(_key, early), evaluate(part.before, known, early, now.rows), strict=True))
        if part.after:
            then = _Moment(self, t - s - 1)
            known = self._known(then, stage, s, slots) | then.gate({x: v for (x, _), v in zip(self.wiring.kept, kept, strict=True)})
            due = [x for x in wanted if x is not None and x in late]
            results.update(zip(map(_key, due), evaluate(part.after, known, due, then.rows), strict=True))
        made = [
            _zeros(aval) if x is None else _wire(results[_key(x)])
            for (aval, _), x in zip(self.wiring.branch_results, wanted, strict=True)
        ]
        return made, [results[_key(state[j])] if j in state else slots[j] for j in self._state_slots()]

    def _known(self, now: _Moment, stage: Stage, s: int, slots: list) -> dict[Value, Any]:
        slot_of = self.loop.placement.slot_of(s)
        weights = now.gate({x: slots[slot_of[weight]] for x, weight in stage.weights.items()})
        read = set(stage.inputs)
        inputs = {x: now.input(j) for j, x in enumerate(self.program.inputs) if x in read}
        return {**self.program.constants, **weights, **inputs}

    def _state_of(self, stage: Stage) -> list[tuple[Any, Weight]]:
        """(new value, weight) for the state that this stage updates."""
        return [(x, self.loop.state[p]) for p, x in stage.outputs.items() if p in self.loop.state]

    def _state_slots(self) -> list[int]:
        weights = set(self.loop.state.values())
        return [j for j, slot in enumerate(self.loop.placement.slots) if weights.intersection(slot.weights)]


class _Moment:
    """The microbatch that this device works on; outside 0..M-1 it is a bubble."""

    def __init__(self, ticks: _Ticks, microbatch: Any):
        loop = ticks.loop
        self.ticks = ticks
        self.is_active = (microbatch >= 0) & (microbatch < loop.num_microbatches)
        self.index = jnp.clip(microbatch, 0, loop.num_microbatches - 1)
        self.rows = Rows(ticks.replica * loop.num_microbatches + self.index)

    def input(self, j: int) -> Any:
        array = self.ticks.inputs[j]
        return array if self.ticks.loop.in_axes[j] is None else lax.dynamic_index_in_dim(array, self.index, 0, False)

    def gate(self, values: dict[Value, Any]) -> dict[Value, Any]:
        """The same values; in a bubble their gradients are zero, whatever comes back."""
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


def _made(body: Mapping[int, Any], branch: Sequence[Any], source: FromBody | FromBranch) -> Any:
    return body[source.result] if isinstance(source, FromBody) else branch[source.result]


def _key(operand: Any) -> Any:
    """Literals have no identity of their own as mapping keys."""
    return operand if isinstance(operand, int) else id(operand)


def _choose(condition: Any, a: Any, b: Any) -> Any:
    """`where`, for random keys too."""
    return _unwire(jnp.where(condition, _wire(a), _wire(b)), jax.typeof(a))


def is_key(aval: Any) -> bool:
    """Whether a type is that of random keys, which collectives and arithmetic do not take."""
    return jax.dtypes.issubdtype(aval.dtype, jax.dtypes.prng_key)


def _wire(value: Any) -> Any:
    """A value in the form in which it crosses: random keys as their data."""
    value = jnp.asarray(value)
    return jax.random.key_data(value) if is_key(value) else value


def _unwire(value: Any, aval: Any) -> Any:
    return jax.random.wrap_key_data(value, impl=jax.random.key_impl(aval)) if is_key(aval) else value


def _wire_aval(aval: Any) -> Any:
    return jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(aval.shape, aval.dtype)) if is_key(aval) else aval


def _fill(aval: Any, value: float) -> Any:
    return jnp.full(aval.shape, value if jnp.issubdtype(aval.dtype, jnp.inexact) else 0, aval.dtype)


def _zeros(aval: Any) -> Any:
    aval = _wire_aval(aval)
    return np.zeros(aval.shape, aval.dtype)
