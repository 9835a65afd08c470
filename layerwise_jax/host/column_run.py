"""One column's part of one step: walks the column's steps, calls compiled programs, sends what they
make.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax

from layerwise_jax.host.compiled import StageCalls
from layerwise_jax.host.stage_program import StageProgram
from layerwise_jax.host.workers import Key, Mailboxes, StoppedError
from layerwise_jax.schedule.columns import Step
from layerwise_jax.trace.program import Value, Weight

Arrays = tuple[Any, ...]


class Held(NamedTuple):
    """Arrays held from a microbatch's forward to its backward: live-in values, state and stash."""

    live_in: Arrays
    state: Arrays
    stash: Arrays


@dataclass(frozen=True, eq=False)
class Routes:
    """Routing table: column and sharding of the receiver of every message.

    Attributes:
      column_of: the column of every stage.
      maker_of: the column that makes each live value.
      shardings: the sharding of messages on every column.
    """

    column_of: Sequence[int]
    maker_of: Mapping[Value, int]
    shardings: Sequence[Any]


@dataclass(eq=False)
class ColumnRun:
    """The arrays of one column during one step. Only the column's thread touches them.

    Attributes:
      column: the column.
      calls: all stages.
      programs: compiled programs by (stage, kind).
      mail: the step's mailboxes.
      routes: where messages go.
      prepared: prepared values.
      inputs: full inputs, by position.
      indices: the number of every microbatch, as arrays on this column.
      state: state weights as the last forward left them.
      accumulators: sums of gradients, by prepared value.
      sums: sums of outputs, by position.
      waits: whether messages are waited for (False: one thread runs all columns).
      trains: whether backwards follow, so that forward keeps a stash.
      observe: called with the results of every program, to time it.
      listed: the other outputs, of every microbatch in order, by position.
    """

    column: int
    calls: Sequence[StageCalls]
    programs: Mapping[tuple[int, str], Any]
    mail: Mailboxes
    routes: Routes
    prepared: Mapping[Value, Any]
    inputs: Mapping[int, Any]
    indices: Sequence[Any]
    state: dict[Weight, Any]
    accumulators: dict[Value, Any]
    sums: dict[int, Any]
    waits: bool
    trains: bool
    observe: Callable[[Any], None] | None = None
    listed: dict[int, list[Any]] = field(default_factory=dict)
    failed: Step | None = None
    _held: dict[tuple[int, int], Held] = field(default_factory=dict)
    _operands: dict[tuple[int, int], Arrays] = field(default_factory=dict)

    def run(self, step: Step) -> None:
        """Do one step.

        Raises:
          StoppedError: another column has failed.
        """
        run: Callable[[Step, StageCalls], None] = {
            "F": self._forward,
            "FB": self._both,
            "B": self._backward,
            "I": self._input_gradients,
            "W": self._weight_gradients,
        }[step.kind]
        try:
            with jax.profiler.TraceAnnotation(str(step)):
                run(step, self.calls[step.stage])
        except StoppedError:
            raise
        except Exception as error:
            # XLA's errors name neither stage nor microbatch.
            error.add_note(f"while running {step.describe()} on column {self.column}")
            self.failed = step
            raise

    def _call(self, stage: int, kind: str, *arguments: Any) -> Any:
        """Dispatch a program; it runs when its arguments are there."""
        results = self.programs[stage, kind](*arguments)
        # Timing waits for the results here; a normal step does not.
        if self.observe is not None:
            self.observe(results)
        return results

    def clear(self) -> None:
        """Drop all arrays: an exception's traceback keeps this object alive."""
        for arrays in (
            self.state,
            self.accumulators,
            self.sums,
            self.listed,
            self._held,
            self._operands,
        ):
            arrays.clear()

    def _forward(self, step: Step, calls: StageCalls) -> None:
        stage, microbatch = calls.functions.stage, step.microbatch
        live_in, state = self._received(stage, microbatch), self._state(calls)
        sums, live_out, listed, new_state, stash = self._call(
            step.stage,
            # E returns no stash: nothing is kept without a backward.
            "F" if self.trains else "E",
            self._sums(calls),
            self._prepared(stage),
            live_in,
            self._inputs(stage),
            state,
            self.indices[microbatch],
        )
        # Residuals of this microbatch; its backward takes them out again.
        if self.trains and stage.has_backward:
            self._held[step.stage, microbatch] = Held(live_in, state, stash)
        self._send(stage, live_out, microbatch)
        self._put_outputs(calls, sums, listed, new_state)

    def _both(self, step: Step, calls: StageCalls) -> None:
        stage, microbatch = calls.functions.stage, step.microbatch
        accumulators, sums, cotangents, listed, new_state = self._call(
            step.stage,
            "FB",
            self._accumulators(stage),
            self._sums(calls),
            self._prepared(stage),
            self._received(stage, microbatch),
            self._inputs(stage),
            self._state(calls),
            self.indices[microbatch],
        )
        self._send_back(stage, cotangents, microbatch)
        self.accumulators.update(zip(stage.trained, accumulators, strict=True))
        self._put_outputs(calls, sums, listed, new_state)

    def _backward(self, step: Step, calls: StageCalls) -> None:
        stage = calls.functions.stage
        read = self._read_by_backward(step, stage)
        accumulators, cotangents = self._call(step.stage, "B", self._accumulators(stage), *read)
        self._send_back(stage, cotangents, step.microbatch)
        self.accumulators.update(zip(stage.trained, accumulators, strict=True))

    def _input_gradients(self, step: Step, calls: StageCalls) -> None:
        """Backward, but for gradients that are products, whose operands are kept."""
        functions = calls.functions
        stage = functions.stage
        # Accumulators of products stay with the column: W adds to them later.
        rest = [x for j, x in enumerate(stage.trained) if j not in functions.products]
        read = self._read_by_backward(step, stage)
        given = tuple(self.accumulators[x] for x in rest)
        accumulators, cotangents, computed = self._call(step.stage, "I", given, *read)
        self._send_back(stage, cotangents, step.microbatch)
        self.accumulators.update(zip(rest, accumulators, strict=True))
        _, live_in, _, _, stash, received, _ = read
        # Operands are arrays that exist already; keeping a reference copies nothing.
        groups = {"computed": computed, "live_in": live_in, "stash": stash, "cotangents": received}
        operands = tuple(groups[group][place] for group, place in functions.operand_sources)
        if operands:
            self._operands[step.stage, step.microbatch] = operands

    def _weight_gradients(self, step: Step, calls: StageCalls) -> None:
        functions = calls.functions
        products = [functions.stage.trained[j] for j in functions.products]
        operands = self._operands.pop((step.stage, step.microbatch))
        given = tuple(self.accumulators[x] for x in products)
        accumulators = self._call(step.stage, "W", given, operands)
        # The old accumulators were donated: the results take their place.
        self.accumulators.update(zip(products, accumulators, strict=True))

    def _read_by_backward(self, step: Step, stage: StageProgram) -> tuple[Any, ...]:
        """Arguments of the backward of a microbatch; takes its held arrays out of the column.

        Waits for the cotangents of all consumers.
        """
        cotangents = tuple(
            self.mail.get(Key("cotangent", x, consumer, step.microbatch), wait=self.waits)
            for x, consumers in stage.pulled.items()
            for consumer in consumers
        )
        # Popped, so that the arrays are freed once the program has read them.
        held = self._held.pop((step.stage, step.microbatch))
        inputs, index = self._inputs(stage), self.indices[step.microbatch]
        return (
            self._prepared(stage),
            held.live_in,
            inputs,
            held.state,
            held.stash,
            cotangents,
            index,
        )

    def _received(self, stage: StageProgram, microbatch: int) -> Arrays:
        keys = (Key("activation", x, stage.stage, microbatch) for x in stage.live_in)
        return tuple(self.mail.get(key, wait=self.waits) for key in keys)

    def _send(self, stage: StageProgram, arrays: Arrays, microbatch: int) -> None:
        """Live values straight to every stage that reads them."""
        for (x, consumers), array in zip(stage.consumers.items(), arrays, strict=True):
            # `consumers` is ordered last stage first.
            for consumer in reversed(consumers):  # the next stage first
                key = Key("activation", x, consumer, microbatch)
                self.mail.put(key, self._moved(array, self.routes.column_of[consumer]))

    def _send_back(self, stage: StageProgram, cotangents: Arrays, microbatch: int) -> None:
        """Cotangents to the stages that made the live values."""
        for x, array in zip(stage.differentiated, cotangents, strict=True):
            # The key names the consumer that sends the cotangent: a maker adds one from each.
            key = Key("cotangent", x, stage.stage, microbatch)
            self.mail.put(key, self._moved(array, self.routes.maker_of[x]))

    def _moved(self, array: Any, column: int) -> Any:
        """The array on another column; itself where the consumer is on the same one."""
        if column == self.column:
            return array
        # Asynchronous copy between devices: the thread does not wait for it.
        return jax.device_put(array, self.routes.shardings[column])

    def _put_outputs(
        self, calls: StageCalls, sums: Arrays, listed: Arrays, new_state: Arrays
    ) -> None:
        self.sums.update(zip(calls.summed, sums, strict=True))
        for position, array in zip(calls.listed, listed, strict=True):
            # Forwards of a stage run in the order of microbatches: the list is in that order.
            self.listed.setdefault(position, []).append(array)
        # The next microbatch of this stage reads the new state.
        self.state.update(zip(calls.renewed, new_state, strict=True))

    def _sums(self, calls: StageCalls) -> Arrays:
        return tuple(self.sums[p] for p in calls.summed)

    def _accumulators(self, stage: StageProgram) -> Arrays:
        return tuple(self.accumulators[x] for x in stage.trained)

    def _prepared(self, stage: StageProgram) -> Arrays:
        return tuple(self.prepared[x] for x in stage.prepared)

    def _inputs(self, stage: StageProgram) -> Arrays:
        return tuple(self.inputs[j] for j in stage.inputs)

    def _state(self, calls: StageCalls) -> Arrays:
        return tuple(
            self.state[calls.functions.program.weights[x]] for x in calls.functions.stage.state
        )
