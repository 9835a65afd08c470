"""Stage programs: every stage as a function of prepared weights, live values, inputs and state.

Nothing of the loop's alignment, lanes or slots is used. A value goes from the stage that makes it
straight to each
stage that reads it; stages in between neither hold nor send it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from layerwise_jax._jax import Literal
from layerwise_jax.stage.cut import Stage
from layerwise_jax.trace.derivative import is_inexact
from layerwise_jax.trace.program import Op, Operand, Program, Value, Weight, nbytes


@dataclass(frozen=True, eq=False)
class StageProgram:
    """One stage of one microbatch, without the prelude (operations on weights
    only, see `prelude_ops`).

    Attributes:
      stage: its number.
      device: its column.
      ops: its operations, in the order of the trace.
      prepared: what it reads of the prelude: weights, constants, and what the prelude makes of
        them.
      live_in: values that it reads and another stage makes.
      inputs: positions of the input leaves that it reads.
      state: the values of the state weights that it reads.
      live_out: values that it makes and another stage reads.
      outputs: positions of the program's outputs that it makes, new state left out.
      new_state: positions of the outputs that are new state.
      results: the operand of every live_out, output and new state, in this order.
      consumers: for every live_out, the stages that read it, the last one first.
      trained: the prepared values that have a gradient.
      differentiated: the live_in values that have a cotangent.
      pulled: the live_out values whose consumers send cotangents back, each with those consumers,
        the last one first.
      makes_loss: whether it makes the program's first output, and that depends on a trained weight.
    """

    stage: int
    device: int
    ops: tuple[Op, ...]
    prepared: tuple[Value, ...]
    live_in: tuple[Value, ...]
    inputs: tuple[int, ...]
    state: tuple[Value, ...]
    live_out: tuple[Value, ...]
    outputs: tuple[int, ...]
    new_state: tuple[int, ...]
    results: tuple[Operand, ...]
    consumers: Mapping[Value, tuple[int, ...]]
    trained: tuple[Value, ...]
    differentiated: tuple[Value, ...]
    pulled: Mapping[Value, tuple[int, ...]]
    makes_loss: bool

    @property
    def has_backward(self) -> bool:
        """True if its backward has a result: a weight gradient or a cotangent."""
        return bool(self.trained or self.differentiated)


def prelude_ops(program: Program, state: Collection[Weight]) -> list[Op]:
    """Prelude: operations on weights and constants only, run once a step, not once a microbatch.

    Casts, transposed and dequantized weights, the rows of a stacked leaf. Left in the stage is what
    reads state, draws
    for the whole batch, has an effect, or makes more bytes than it reads (a position bias).
    """
    weights = {x for x, weight in program.weights.items() if weight not in state}
    fixed = weights | set(program.constants)
    found = []
    for op in program.ops:
        # Not draws for the full batch, which are sliced by microbatch.
        pure = op.full_rows is None and not op.eqn.effects
        if not pure or not fixed.issuperset(op.values) or weights.isdisjoint(op.values):
            continue
        # Growing ops stay in the stage: their results would be held for the whole step.
        if sum(nbytes(program.avals[x]) for x in op.results) <= sum(
            nbytes(program.avals[x]) for x in op.values
        ):
            found.append(op)
            fixed.update(op.results)
            weights.update(op.results)
    return found


def moving_values(program: Program, trained: Collection[Weight]) -> set[Value]:
    """The values that have a gradient: inexact ones that depend on a trained weight."""
    moving = {
        x
        for x, weight in program.weights.items()
        if weight in trained and is_inexact(program.avals[x])
    }
    for op in program.ops:
        if not moving.isdisjoint(op.values):
            # Integers stop a gradient: an argmax has none.
            moving.update(x for x in op.results if is_inexact(program.avals[x]))
    return moving


def split_stages(
    program: Program,
    stages: Sequence[Stage],
    prelude: Collection[Op],
    devices: Mapping[int, int],
    state: Mapping[int, Weight],
    trained: Collection[Weight],
) -> tuple[StageProgram, ...]:
    """Every stage as a program.

    Args:
      program: the program.
      stages: its stages.
      prelude: the operations that run once a step, see `prelude_ops`.
      devices: the device of every stage.
      state: for outputs that are new values of weights, which weight.
      trained: the weights that have a gradient.

    Returns:
      The programs, of which it holds, and is checked: each reads only what it is given or makes.
    """
    splitter = _Splitter(
        program, stages, set(prelude), devices, state, moving_values(program, trained)
    )
    found: dict[int, StageProgram] = {}
    for s in reversed(range(len(stages))):  # a stage's backward depends on those of its consumers
        found[s] = splitter.split(s, found)
    for stage in found.values():
        splitter.check(stage)
    return tuple(found[s] for s in range(len(stages)))


class _Splitter:
    def __init__(
        self,
        program: Program,
        stages: Sequence[Stage],
        prelude: Collection[Op],
        devices: Mapping[int, int],
        state: Mapping[int, Weight],
        moving: Collection[Value],
    ):
        self.program, self.stages, self.devices, self.moving, self.state = (
            program,
            stages,
            devices,
            moving,
            state,
        )
        self.state_values = {x for x, weight in program.weights.items() if weight in state.values()}
        self.prepared = {
            *program.weights,
            *program.constants,
            *(x for op in prelude for x in op.results),
        }
        # State changes with every microbatch, so it cannot be prepared once a step.
        self.prepared -= self.state_values
        self.ops = [tuple(op for op in stage.ops if op not in prelude) for stage in stages]
        self.reads = [self._reads(s) for s in range(len(stages))]
        received = [set(stage.receives) for stage in stages]
        self.maker = {
            x: s for s, stage in enumerate(stages) for x in stage.sends if x not in received[s]
        }

    def _reads(self, s: int) -> list[Value]:
        """The values that a stage reads from outside, in order of first use."""
        made = {x for op in self.ops[s] for x in op.results}
        operands = [x for op in self.ops[s] for x in op.operands] + list(
            self.stages[s].outputs.values()
        )
        return list(
            dict.fromkeys(x for x in operands if not isinstance(x, Literal) and x not in made)
        )

    def split(self, s: int, later: Mapping[int, StageProgram]) -> StageProgram:
        stage, reads, moving = self.stages[s], self.reads[s], self.moving
        # A stage may recompute, from inputs only, what another one sends: only what it receives
        # is live.
        live_in = tuple(x for x in reads if x in self.maker and x in stage.receives)
        consumers = {
            x: tuple(
                c
                # Last stage first: the order in which their cotangents are added.
                for c in reversed(range(s + 1, len(self.stages)))
                if x in self.stages[c].receives and x in self.reads[c]
            )
            for x, maker in self.maker.items()
            if maker == s
        }
        consumers = {x: readers for x, readers in consumers.items() if readers}
        pulled = {
            x: back
            for x, readers in consumers.items()
            if (back := tuple(c for c in readers if x in later[c].differentiated))
        }
        makes_loss = 0 in stage.outputs and stage.outputs[0] in moving and 0 not in self.state
        # Without a cotangent from a consumer or the loss there is nothing to pull back.
        has_backward = bool(pulled) or makes_loss
        outputs = tuple(p for p in stage.outputs if p not in self.state)
        new_state = tuple(p for p in stage.outputs if p in self.state)
        # In the order of first use, so that equal layers have equal signatures.
        prepared = tuple(x for x in reads if x in self.prepared)
        return StageProgram(
            stage=s,
            device=self.devices[s],
            ops=self.ops[s],
            prepared=prepared,
            live_in=live_in,
            inputs=tuple(j for j, x in enumerate(self.program.inputs) if x in reads),
            state=tuple(x for x in reads if x in self.state_values),
            live_out=tuple(consumers),
            outputs=outputs,
            new_state=new_state,
            results=(*consumers, *(stage.outputs[p] for p in (*outputs, *new_state))),
            consumers=consumers,
            trained=tuple(x for x in prepared if x in moving) if has_backward else (),
            differentiated=tuple(x for x in live_in if x in moving) if has_backward else (),
            pulled=pulled,
            makes_loss=makes_loss,
        )

    def check(self, stage: StageProgram) -> None:
        inputs = {self.program.inputs[j] for j in stage.inputs}
        known = {*stage.prepared, *stage.live_in, *inputs, *stage.state}
        for op in stage.ops:
            assert known.issuperset(op.values), (
                f"stage {stage.stage} reads what it does not have: {op.eqn}"
            )
            known.update(op.results)
        made = [x for x in stage.results if not isinstance(x, Literal)]
        assert known.issuperset(made), f"stage {stage.stage} does not make what it must send"
