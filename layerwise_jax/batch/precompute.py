"""Values of inputs only that are computed for the full batch, before the first microbatch.

The denominator of a masked mean, sum(mask), is a sum over the batch of inputs: a part knows its own
share only. It depends on no parameter, so it is computed once for the full batch and enters the
staged program as one more input. So do draws that no part can make and examples that inputs only
reorder.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax

from layerwise_jax import _jax
from layerwise_jax.batch.lattice import (
    NotSeparable,
    PartialExtreme,
    PartialSum,
    Parts,
    Permuted,
    Replicated,
    Role,
    Split,
    scaling_axes,
)
from layerwise_jax.batch.pairs import PairedOp, ProgramPair, constants_of
from layerwise_jax.trace.program import Op, Program, Value, evaluate, without_dead_code


@dataclass(frozen=True, eq=False)
class Precomputed:
    """Program of the full batch that makes the additional inputs of a staged program.

    Attributes:
      program: from the inputs to the additional inputs.
      in_axes: for each additional input, 0 if its leading axis is the batch, else None.
    """

    program: Program
    in_axes: tuple[int | None, ...]

    @cached_property
    def _run(self) -> Any:
        program = self.program

        def run(constants: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
            env = dict(zip(program.constants, constants, strict=True))
            env.update(zip(program.inputs, inputs, strict=True))
            return evaluate(program.ops, env, program.outputs)

        return jax.jit(run)

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        """The additional inputs, from the input leaves of the full batch."""
        return self._run(list(self.program.constants.values()), list(inputs))


class Candidates:
    """Values of the full program that are, or may be, computed beforehand.

    Attributes:
      roles: by value, the role of those that are.
    """

    def __init__(
        self,
        pair: ProgramPair,
        parts: Parts,
        roles: Mapping[Value, Role],
        only_draws: bool = False,
    ):
        self.roles = dict(roles)
        self._pair = pair
        self._parts = parts
        self._only_draws = only_draws
        self._found: dict[Value, Role] = {}
        self._twins = _twins(pair)  # the part's value for each of the full program's
        weights = pair.full.weights.items()
        # Values that no parameter enters; state is a parameter, a captured array is none.
        self._from_inputs = _values_without(
            pair.full, [value for value, weight in weights if not weight.is_captured]
        )
        self._live = _live_ops(pair, roles)

    @property
    def is_settled(self) -> bool:
        """True if the run found no further value to compute beforehand."""
        return not self._found

    def is_live(self, op: PairedOp) -> bool:
        """True if an operation is still needed for an output."""
        return id(op) in self._live

    def following(self) -> dict[Value, Role]:
        """Roles of the values to compute beforehand in the next run."""
        return {**self.roles, **self._found}

    def note(self, op: PairedOp, operands: Sequence[Role], results: Sequence[Role]) -> None:
        """Note what must be computed beforehand for an operation not to mix examples.

        Args:
          op: an operation of the program.
          operands: roles of its operands.
          results: roles of its results.
        """
        mixed = [role for role in results if isinstance(role, NotSeparable)]
        # Effects must run once per part, in the loop.
        if not mixed or op.full.eqn.effects:
            return
        # Under per-microbatch statistics other operations may mix the examples of a part.
        if self._only_draws and all(role.cause != "draw" for role in mixed):
            return
        pairs = list(zip(op.full.operands, operands, strict=True))
        # sum(x * mask) / sum(mask): the denominator, a sum of inputs, is what is missing.
        totals = [
            x
            for x, role in pairs
            if isinstance(role, PartialSum | PartialExtreme)
            and not isinstance(x, _jax.Literal)
            and x in self._from_inputs
        ]
        # Otherwise the results themselves, at the first operation that mixes.
        is_first = not any(isinstance(role, NotSeparable) for role in operands)
        for value in totals or (op.full.results if is_first else ()):
            if value in self._from_inputs:
                self._add(value)

    def note_constant(self, value: Value, role: Role) -> None:
        """Note an array of the function that follows the length of the batch."""
        if isinstance(role, NotSeparable) and not self._only_draws:
            self._add(value)

    def note_orders(self, roles: Mapping[Value, Role]) -> None:
        """Note reordered rows of inputs (a sort) that other operations or outputs read unrestored.

        Args:
          roles: role of every value of the full program.
        """
        if self._only_draws:
            return
        # Values that operations on weights read; between operations on inputs an order is harmless.
        read = {x for op in self._pair.ops if not self._is_of_inputs(op) for x in op.full.values}
        outputs = {x for x in self._pair.full.outputs if not isinstance(x, _jax.Literal)}
        for value in (read | outputs) & self._from_inputs:
            if isinstance(roles[value], Permuted):
                self._add(value)

    def _is_of_inputs(self, op: PairedOp) -> bool:
        return self._from_inputs.issuperset(op.full.results)

    def _add(self, value: Value) -> None:
        twin = self._twins.get(value)
        if twin is None or value in self.roles:
            return
        micro = self._pair.micro.avals[twin].shape
        full = self._pair.full.avals[value].shape
        # Inputs are split along their leading axis or not at all.
        axes = scaling_axes(micro, full) if len(micro) == len(full) else None
        # No batch axis: every part gets the same value. [batch, ...]: each part gets its rows.
        if axes == ():
            self._found[value] = Replicated()
        elif axes == (0,) and full[0] == self._parts * micro[0]:
            self._found[value] = Split(0)


def precomputed_inputs(
    pair: ProgramPair, program: Program, roles: Mapping[Value, Role]
) -> tuple[Program, Precomputed | None]:
    """Turn precomputed values into additional inputs of a part's program.

    Args:
      pair: the two programs.
      program: the part's program, operations as they are to run.
      roles: the values of the full program that are computed beforehand.

    Returns:
      The part's program with additional inputs after its own, and the program that makes them.
    """
    if not roles:
        return program, None
    twins = _twins(pair)
    values = list(roles)
    inputs = [twins[value] for value in values]
    # The part's own operation would define the value a second time: rename its result.
    ops, avals = _without_results(program, inputs)
    constants = {x: array for x, array in program.constants.items() if x not in inputs}
    # The operations that made the values stay in their places, their results unread.
    part = replace(
        program,
        ops=ops,
        avals=avals,
        inputs=(*program.inputs, *inputs),
        constants=constants,
    )
    full = pair.full
    # Captured arrays are weights of the staged program; this program runs outside of it.
    full = full.captured_as_constants(full.captured)
    # The full batch's program, as far as it makes the values.
    makers = without_dead_code(full.ops, values)
    read = {x for op in makers for x in op.values} | set(values)
    used = {x: array for x, array in full.constants.items() if x in read}
    made = replace(full, ops=tuple(makers), outputs=tuple(values), constants=used, weights={})
    axes = tuple(0 if isinstance(roles[value], Split) else None for value in values)
    return part, Precomputed(made, axes)


def _without_results(
    program: Program, inputs: Collection[Value]
) -> tuple[tuple[Op, ...], tuple[Any, ...]]:
    """Operations whose results at `inputs` get new numbers that nothing reads, and all types."""
    avals = list(program.avals)
    ops = []
    for op in program.ops:
        results = list(op.results)
        for i, value in enumerate(results):
            if value in inputs:  # now an input: the operation's own result gets a new number
                results[i] = len(avals)
                avals.append(program.avals[value])
        ops.append(replace(op, results=tuple(results)))
    return tuple(ops), tuple(avals)


def _twins(pair: ProgramPair) -> dict[Value, Value]:
    """The part's value for each value of the full program that both traces make alike."""
    own = {id(op) for op in pair.micro.ops}  # not those that stand in for another sequence
    twins = {}
    for op in pair.ops:
        if op.micro is not None and id(op.micro) in own:
            twins.update(zip(op.full.results, op.micro.results, strict=True))
    micro = list(pair.micro.constants)
    twins.update(zip((value for value, _, _ in constants_of(pair)), micro, strict=True))
    return twins


def _values_without(program: Program, sources: Collection[Value]) -> set[Value]:
    """Values that depend on none of `sources`."""
    behind = set(sources)
    for op in program.ops:
        if behind.intersection(op.values):
            behind.update(op.results)
    return {x for op in program.ops for x in op.results} - behind


def _live_ops(pair: ProgramPair, known: Collection[Value]) -> set[int]:
    """Ids of the operations that the outputs need, given the values `known`."""
    needed = {x for x in pair.full.outputs if not isinstance(x, _jax.Literal)} - set(known)
    live = set()
    for op in reversed(pair.ops):
        if op.full.eqn.effects or needed.intersection(op.full.results):
            live.add(id(op))
            needed.update(x for x in op.full.values if x not in known)
    return live
