"""Executor `host`: a pipeline's stages as separate programs, driven by one thread per column."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from layerwise_jax._jax import no_context_mesh
from layerwise_jax.host.column_run import ColumnRun
from layerwise_jax.host.library import Library, Progress
from layerwise_jax.host.memory import ColumnMemory, column_memory
from layerwise_jax.host.placement import HostPlacement, HostStaged
from layerwise_jax.host.program import HostProgram
from layerwise_jax.host.timeline import StepClock, Timeline
from layerwise_jax.host.workers import Mailboxes, StoppedError, Workers
from layerwise_jax.schedule.columns import Column, in_one_thread
from layerwise_jax.stage.placement import Staged
from layerwise_jax.trace.derivative import is_inexact
from layerwise_jax.trace.program import Weight

# Steps that may be dispatched and not done: the next one is prepared while one computes.
STEPS_AHEAD = 2


@dataclass(eq=False)
class HostExecutor:
    """Executor that runs a pipeline's stages as separate programs.

    Attributes:
      program: stages, placement, columns and routes, fixed before the first step.
      threads: True for a thread per column; False runs all columns in the caller's thread.
      progress: called after every compiled program.
    """

    program: HostProgram
    threads: bool = True
    progress: Progress | None = None
    _warm: set[bool] = field(default_factory=set)  # modes (trains or not) that have run once
    _dispatched: deque[Any] = field(default_factory=deque)  # an output of the last steps

    @property
    def placement(self) -> HostPlacement:
        """Placement: the slot and the column of every weight."""
        return self.program.placement

    @cached_property
    def library(self) -> Library:
        """All stage programs."""
        return Library(self.program.calls, self.program.options)

    def compile(self, *, trains: bool) -> None:
        """Compile what a step needs: done by the first step, if not before.

        Call it in the config contexts (matmul precision) that programs are to be compiled in.
        """
        # A set: microbatches share one program of a stage and kind.
        kinds = {(step.stage, step.kind) for column in self._columns(trains) for step in column}
        wanted = [(stage, "E" if kind == "F" and not trains else kind) for stage, kind in kinds]
        self.library.compile(sorted(wanted), self.progress)

    def memory(self, optimizer_state: Any = None) -> list[ColumnMemory]:
        """Peak bytes on each device of every column in a training step, which is compiled if it is
        not yet: see `column_memory`.
        """
        self.compile(trains=True)
        return column_memory(self.program, self.library, optimizer_state)

    def timeline(self, staged: Staged, inputs: Sequence[Any]) -> Timeline:
        """Seconds of every step of a training step, one step at a time: see `Timeline`.

        Args:
          staged: placed parameters.
          inputs: the leaves of the full batch.
        """
        weights = self._weights(staged)
        self._step(weights, inputs, trains=True)  # compiled, and called once
        clock = StepClock()
        mail = Mailboxes(self.program.messages(True))
        runs = [self._column_run(c, own, inputs, mail, True) for c, own in enumerate(weights)]
        for run in runs:
            run.waits, run.observe = False, clock.observe
        for column, step in in_one_thread(self.program.columns):
            clock.start(step, column)
            runs[column].run(step)
        return Timeline(self.program.schedule, tuple(clock.spans))

    @no_context_mesh()
    def evaluate(self, staged: Staged, inputs: Sequence[Any]) -> tuple[list[Any], HostStaged]:
        """All outputs for the batch, and the placed parameters with new state.

        Args:
          staged: placed parameters.
          inputs: the leaves of the full batch.
        """
        runs = self._step(self._weights(staged), inputs, trains=False)
        results = self._outputs(runs)
        return results, self._with_state(staged, runs, results)

    @no_context_mesh()
    def value_and_grad(
        self, staged: Staged, inputs: Sequence[Any]
    ) -> tuple[list[Any], HostStaged, HostStaged]:
        """All outputs for the batch, placed gradients, and the placed parameters with new state."""
        weights = self._weights(staged)
        runs = self._step(weights, inputs, trains=True)
        shares = [
            calls.finish(run.accumulators, own)
            for calls, run, own in zip(self.program.column_calls, runs, weights, strict=True)
        ]
        results = self._outputs(runs)
        return results, self._gradients(shares), self._with_state(staged, runs, results)

    def _columns(self, trains: bool) -> tuple[Column, ...]:
        return self.program.columns if trains else self.program.forward_columns

    def _weights(self, staged: Staged) -> list[dict[Weight, Any]]:
        """The weights of every column."""
        slots = self.placement.slots_of
        return [{weight: staged[slot.name] for weight, slot in held.items()} for held in slots]

    def _step(
        self, weights: Sequence[dict[Weight, Any]], inputs: Sequence[Any], *, trains: bool
    ) -> list[ColumnRun]:
        """Dispatch one run of all columns; waits only for the step before the last one."""
        self.compile(trains=trains)
        # Bounds the memory of steps in flight: each holds its activations.
        while len(self._dispatched) >= STEPS_AHEAD:
            jax.block_until_ready(self._dispatched.popleft())
        mail = Mailboxes(self.program.messages(trains))
        runs = [
            self._column_run(column, own, inputs, mail, trains)
            for column, own in enumerate(weights)
        ]
        self._drive(self._columns(trains), runs, mail)
        self._warm.add(trains)
        return runs

    def _column_run(
        self,
        column: int,
        weights: dict[Weight, Any],
        inputs: Sequence[Any],
        mail: Mailboxes,
        trains: bool,
    ) -> ColumnRun:
        program, calls = self.program, self.program.column_calls[column]
        # Fresh arrays every step: programs donate them.
        accumulators, sums = calls.zeros() if trains else ({}, calls.output_zeros())
        # Only the inputs that this column's stages read are copied to it.
        read = {j for stage in program.stages if stage.device == column for j in stage.inputs}
        return ColumnRun(
            column=column,
            calls=program.calls,
            programs=self.library.programs,
            mail=mail,
            routes=program.routes,
            prepared=calls.prepare(weights),
            inputs={
                j: jax.device_put(inputs[j], program.input_sharding(column, j))
                for j in sorted(read)
            },
            indices=program.indices[column],
            state={w: weights[w] for w in program.staged.state.values() if w in weights},
            accumulators=accumulators,
            sums=sums,
            # The first step runs in one thread, in an order in which no message is missing.
            waits=self.threads and trains in self._warm,
            trains=trains,
        )

    def _drive(self, columns: Sequence[Column], runs: Sequence[ColumnRun], mail: Mailboxes) -> None:
        """Run every column's steps.

        The first step of its kind runs in this thread: libraries record streams when a program is
        first called (cuDNN, command buffers), which two threads must not do at once.

        Raises:
          Exception: the first failure, in the order of the schedule's ticks.
        """
        if not runs[0].waits:
            for column, step in in_one_thread(columns):
                runs[column].run(step)
            return

        def job(column: int) -> None:
            for step in columns[column]:
                runs[column].run(step)

        failures = self._workers.run([lambda c=c: job(c) for c in range(len(columns))], mail.stop)
        found = zip(runs, failures, strict=True)
        own = [
            (run.failed or columns[run.column][0], run.column, error)
            for run, error in found
            if error is not None and not isinstance(error, StoppedError)
        ]
        # StoppedError of the other columns follows from the first failure and is not reported.
        if own:
            for run in runs:
                run.clear()
            raise min(own, key=lambda item: item[:2])[2]

    def _gradients(self, shares: Sequence[dict[Weight, Any]]) -> HostStaged:
        """Gradients of every slot.

        Each copy of a tied weight gets the sum of all columns' shares, added in one order, so that
        the copies stay equal bit by bit.
        """
        gradients = {}
        for weight, places in self.placement.copies().items():
            held = [(j, self.placement.column_of[j]) for j, _ in places]
            # Shares in the order of the copies, the same for every copy.
            parts = [(c, shares[c][weight]) for _, c in held if weight in shares[c]]
            for j, column in held:
                slot = self.placement.slots[j]
                gradients[slot.name] = self._gradient(weight, slot.aval, column, parts)
        for slot in self.placement.slots:  # captured arrays have no gradient
            if slot.name not in gradients:
                gradients[slot.name] = np.zeros((1, *slot.aval.shape), jax.dtypes.float0)
        return HostStaged(gradients)

    def _gradient(
        self, weight: Weight, aval: Any, column: int, parts: Sequence[tuple[int, Any]]
    ) -> Any:
        """A slot's gradient from the columns' shares; zeros where no stage gives one."""
        staged = self.program.staged
        if not is_inexact(aval) or (weight in staged.frozen and not staged.is_state(weight)):
            return np.zeros((1, *aval.shape), jax.dtypes.float0)
        sharding = self.program.slot_shardings[column]
        if not parts:
            return jax.device_put(np.zeros((1, *aval.shape), aval.dtype), sharding)
        # All shares on this column: [1, *shape] each.
        here = [x if c == column else jax.device_put(x, sharding) for c, x in parts]
        # Not tied, and cast already: no program needed.
        if len(here) == 1 and here[0].dtype == aval.dtype:
            return here[0]
        return _add_in_order(here, np.dtype(aval.dtype))

    def _outputs(self, runs: Sequence[ColumnRun]) -> list[Any]:
        """All outputs of the function, sharded as the loop's are."""
        found: dict[int, Any] = {}
        for calls, run in zip(self.program.column_calls, runs, strict=True):
            found |= calls.collect(run.sums, run.listed)
        mesh, specs = self.program.mesh, self.program.outputs.specs()
        results = [
            jax.device_put(found[p], NamedSharding(mesh, spec)) if p in found else None
            for p, spec in enumerate(specs)
        ]
        made = [x for x in results if x is not None]
        if made:  # the smallest, a loss mostly: it stays alive for a step
            self._dispatched.append(min(made, key=lambda x: x.size))
        return results

    def _with_state(
        self, staged: Staged, runs: Sequence[ColumnRun], results: Sequence[Any]
    ) -> HostStaged:
        """The placed parameters with carried state from the columns and renewed state from the
        outputs.
        """
        new = {}
        for column, run in enumerate(runs):
            slots, sharding = self.placement.slots_of[column], self.program.slot_shardings[column]
            # Carried state ends as [replicas, ...]; the slot's sharding is over `stage`.
            new |= {slots[w].name: jax.device_put(x, sharding) for w, x in run.state.items()}
            for position, leaf in self.program.staged.renewed.items():
                new |= {
                    slot.name: jax.device_put(weight.of(results[position])[None], sharding)
                    for weight, slot in slots.items()
                    if weight.leaf == leaf
                }
        return HostStaged({**staged, **new})

    @cached_property
    def _workers(self) -> Workers:
        return Workers(len(self.placement.meshes))


def _sum_in_order(parts: Sequence[Any], dtype: Any) -> Any:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total.astype(dtype)


_add_in_order = jax.jit(_sum_in_order, static_argnums=1)
