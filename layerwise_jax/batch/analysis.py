"""What splitting the batch would change, found before it does.

A pipeline runs a function on equal parts of the batch (microbatches, times replicas) and puts the
results together. That is exact only where the function treats examples alone, or ends in a sum or
mean over them. The function is traced on a part and on the full batch, the two traces are walked
side by side, and every value gets a role (`batch_roles`). What no parts combine to is refused with
words, never returned changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax

from layerwise_jax import _jax
from layerwise_jax.batch.interpreter import BatchInterpreter
from layerwise_jax.batch.lattice import Replicated, Role, Split
from layerwise_jax.batch.numbering import mixed_numberings
from layerwise_jax.batch.outputs import (
    OutputAnalysis,
    OutputRole,
    Reduce,
    TracedOutput,
    role_of_one_part,
    state_of_one_part,
)
from layerwise_jax.batch.pairs import BatchError, ProgramPair, pair_programs
from layerwise_jax.batch.rules.draws import Draws
from layerwise_jax.trace.flatten import flatten
from layerwise_jax.trace.layers import LayerSequence
from layerwise_jax.trace.program import Operand, Program, Value

__all__ = ["BatchError", "BatchAnalysis", "OutputRole", "analyze_batching"]


@dataclass(frozen=True, eq=False)
class BatchAnalysis:
    """How a function runs on parts of the batch.

    Attributes:
      program: the program of a part. Operations that draw by shape are marked to be run at the full
        batch.
      outputs: the role of every output leaf.
    """

    program: Program
    outputs: tuple[OutputRole, ...]


def analyze_batching(
    layers: LayerSequence,
    in_axes: Sequence[int | None],
    parts: int,
    *,
    reduce: Reduce | None = None,
    statistics: Literal["per_microbatch"] | None = None,
    state: Sequence[int] = (),
) -> BatchAnalysis:
    """Find out how the outputs of the full batch follow from those of its parts.

    With `statistics="per_microbatch"`, what one operation takes from all examples (the mean that
    batch normalisation subtracts) is taken from those of the part. An output that depends on
    operations which mix examples in other ways is then judged by its shape: rows if its leading
    axis is as long as the batch, else reduced.

    Args:
      layers: the function, traced on one part.
      in_axes: for every input leaf, 0 if its leading axis is the batch, None if every part gets it
        whole.
      parts: equal parts that the batch is split into.
      reduce: how outputs without a batch axis combine.
      statistics: see above; None refuses operations that mix examples.
      state: positions of the outputs that are new state, which parts update in order.

    Raises:
      BatchError: an output would differ from that of the full batch, or `reduce` is missing or
        wrong for it.
    """
    program = layers.program
    if parts == 1:
        return BatchAnalysis(program, _roles_of_one_part(layers, in_axes, reduce, state))
    pair = pair_programs(program, _trace_full(layers, in_axes, parts))
    walk, roles = _interpret(pair, in_axes, parts, statistics is not None)
    judge = OutputAnalysis(parts, reduce, statistics is not None)
    outputs = tuple(
        judge.state(output) if position in state else judge.output(output)
        for position, output in enumerate(_outputs(layers, pair, roles, in_axes))
    )
    ops = [
        replace(op, eqn=walk.corrected.get(i, op.eqn), full_rows=walk.draws.full_rows.get(i))
        for i, op in enumerate(program.ops)
    ]
    return BatchAnalysis(replace(program, ops=tuple(ops)), outputs)


def _roles_of_one_part(
    layers: LayerSequence,
    in_axes: Sequence[int | None],
    reduce: Reduce | None,
    state: Sequence[int],
) -> tuple[OutputRole, ...]:
    signature, program = layers.signature, layers.program
    inputs = zip(signature.inputs_avals, in_axes, strict=True)
    batch = next((aval.shape[0] for aval, axis in inputs if axis is not None), None)
    from_inputs = _values_from(program, program.inputs)
    split = zip(program.inputs, in_axes, strict=True)
    from_batch = _values_from(program, [value for value, axis in split if axis is not None])
    outputs = zip(_output_names(layers), program.outputs, signature.outputs_avals, strict=True)
    return tuple(
        state_of_one_part(from_batch(operand))
        if i in state
        else role_of_one_part(name, aval, batch, from_inputs(operand), reduce)
        for i, (name, operand, aval) in enumerate(outputs)
    )


def _trace_full(layers: LayerSequence, in_axes: Sequence[int | None], parts: int) -> Program:
    signature = layers.signature
    params = [_abstract(aval, 1) for aval in signature.params_avals]
    inputs = [
        _abstract(aval, 1 if axis is None else parts)
        for aval, axis in zip(signature.inputs_avals, in_axes, strict=True)
    ]
    try:
        jaxpr = jax.make_jaxpr(layers.fn)(
            jax.tree.unflatten(signature.params_tree, params),
            *jax.tree.unflatten(signature.inputs_tree, inputs),
        )
    except (TypeError, ValueError, AssertionError) as error:
        raise BatchError(
            "The function was traced on a part of the batch, and fails on the full batch of "
            f"{parts} such parts: "
            f"{error} It may close over an array as long as the part, or name an input in in_axes "
            "that is not split "
            "as one that is."
        ) from error
    return flatten(jaxpr, len(params))


def _abstract(aval: Any, parts: int) -> jax.ShapeDtypeStruct:
    shape = aval.shape if parts == 1 else (aval.shape[0] * parts, *aval.shape[1:])
    return jax.ShapeDtypeStruct(shape, aval.dtype, weak_type=aval.weak_type)


def _interpret(
    pair: ProgramPair, in_axes: Sequence[int | None], parts: int, per_microbatch: bool
) -> tuple[BatchInterpreter, list[Role]]:
    """The interpreter after its run, and the roles of the outputs.

    Runs again while an iota is found to number the full batch where it must number each part.
    """
    inputs = zip(pair.full.inputs, in_axes, strict=True)
    given: dict[Value, Role] = dict.fromkeys(pair.full.weights, Replicated())
    given.update({value: Replicated() if axis is None else Split(axis) for value, axis in inputs})
    per_part: frozenset[int] = frozenset()
    while True:
        walk = BatchInterpreter(parts, per_microbatch, Draws(per_part, per_microbatch))
        roles = walk.outputs(pair, given)
        if not per_microbatch:
            return walk, roles
        found = mixed_numberings(pair, walk.roles, walk.draws.numbered, walk.statistics)
        if not found:
            return walk, roles
        per_part |= found  # iotas of `per_part` are not found again


def _outputs(
    layers: LayerSequence,
    pair: ProgramPair,
    roles: Sequence[Role],
    in_axes: Sequence[int | None],
) -> list[TracedOutput]:
    inputs = zip(pair.full.inputs, in_axes, strict=True)
    from_batch = _values_from(pair.full, [value for value, axis in inputs if axis is not None])
    operands = zip(pair.micro.outputs, pair.full.outputs, strict=True)
    return [
        TracedOutput(name, role, pair.micro.aval(m), pair.full.aval(f), from_batch(f))
        for name, role, (m, f) in zip(_output_names(layers), roles, operands, strict=True)
    ]


def _output_names(layers: LayerSequence) -> list[str]:
    """How to call every output leaf in a message."""
    tree = layers.signature.outputs_tree
    paths, _, _ = _jax.key_paths(jax.tree.unflatten(tree, list(range(tree.num_leaves))))
    names = [f"output {jax.tree_util.keystr(path)}" if path else "the output" for path in paths]
    params = layers.signature.params_names
    return names + [f"the new value of {params[leaf]}" for leaf in layers.signature.mutated]


def _values_from(program: Program, sources: Iterable[Value]) -> Callable[[Operand], bool]:
    """Whether an operand comes from one of these values, or is one."""
    values = set(sources)
    for op in program.ops:
        if values.intersection(op.values):
            values.update(op.results)
    return lambda operand: not isinstance(operand, _jax.Literal) and operand in values
