"""Segments: the ops of one stage outside of the common body.

A stage runs its segment `before` the body, and the last stage one `after` it. Which stage a device
has is known only at run time, so segments run under a condition: see `LocalStage.run_segments`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from layerwise_jax.run.wire import to_wire, zeros_of
from layerwise_jax.stage.staged_program import StagedProgram
from layerwise_jax.trace.program import Op, Operand, Value


@dataclass(frozen=True, eq=False)
class StageSegment:
    """Ops of one stage before or after the common body.

    Attributes:
      program: the staged program.
      stage: the stage.
      ops: the ops.
      results: those of its results that anything uses: index in `Wiring.branch_results` -> operand.
      state: new state that it makes: slot -> operand.
    """

    program: StagedProgram
    stage: int
    ops: tuple[Op, ...]
    results: Mapping[int, Operand]
    state: Mapping[int, Operand]

    @property
    def is_empty(self) -> bool:
        """True if nothing it makes is used."""
        return not self.results and not self.state

    @property
    def wanted(self) -> list[Operand]:
        """The operands of `results`, in order."""
        return list(self.results.values())

    @cached_property
    def slots(self) -> dict[Value, int]:
        """The slot of every weight that it reads, state included."""
        used = {x for op in self.ops for x in op.values}
        # an output may be a weight itself, which no op reads
        used |= {x for x in self.wanted if isinstance(x, int)}
        slot_of = self.program.placement.slot_of(self.stage)
        weights = self.program.stages[self.stage].weights
        return {x: slot_of[weight] for x, weight in weights.items() if x in used}

    @property
    def trained(self) -> dict[Value, int]:
        """The slot of every weight that has a gradient."""
        return {x: j for x, j in self.slots.items() if self.program.has_gradient(j)}

    def weights(self, slots: Sequence[Any]) -> dict[Value, Any]:
        """The weights that it reads, without state: the same for every microbatch."""
        return {x: slots[j] for x, j in self.slots.items() if j not in self.program.state_slots}

    def old_state(self, slots: Sequence[Any]) -> dict[Value, Any]:
        """The state that it reads: changes with every microbatch."""
        return {x: slots[j] for x, j in self.slots.items() if j in self.program.state_slots}


def segment_before_body(program: StagedProgram, s: int) -> StageSegment:
    """The ops that stage s runs before its body."""
    part = program.alignment.parts[s]
    # On the last stage, results of `after` are branch results too.
    made_later = {*part.shape.made, *(x for op in part.after for x in op.results)}
    made_after = made_later.difference(part.shape.made)
    results = _results(program, s)
    return StageSegment(
        program,
        s,
        part.before,
        {r: x for r, x in results.items() if x not in made_after},
        {j: x for j, x in _state(program, s).items() if x not in made_later},
    )


def segment_after_body(program: StagedProgram) -> StageSegment:
    """The ops that the last stage runs after its body; empty if nothing follows it."""
    last = program.num_stages - 1  # the only stage that has ops behind its body
    part = program.alignment.parts[last]
    made = {x for op in part.after for x in op.results}
    results = _results(program, last)
    return StageSegment(
        program,
        last,
        part.after,
        {r: x for r, x in results.items() if x in made},
        {j: x for j, x in _state(program, last).items() if x in made},
    )


def _results(program: StagedProgram, s: int) -> dict[int, Operand]:
    """Stage s's operand of every branch result that it has."""
    # branch_results: (type, [operand of every stage])
    operands = [of_stage[s] for _, of_stage in program.wiring.branch_results]
    return {r: x for r, x in enumerate(operands) if x is not None}


def _state(program: StagedProgram, s: int) -> dict[int, Operand]:
    """The operands that stage s gives to its state slots."""
    slot_of = program.placement.slot_of(s)
    outputs = program.stages[s].outputs.items()
    return {slot_of[program.state[p]]: x for p, x in outputs if p in program.state}


def empty_results(program: StagedProgram) -> list[Any]:
    """Zeros for every branch result, in wire format: stages must agree on types in a branch."""
    return [zeros_of(aval) for aval, _ in program.wiring.branch_results]


def put_results(results: Sequence[Any], made: Mapping[int, Any]) -> list[Any]:
    """Branch results in wire format, with those that a segment made in their places."""
    return [to_wire(made[r]) if r in made else x for r, x in enumerate(results)]
