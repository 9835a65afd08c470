"""Analysis of whether running a function on parts of the batch is exact.

A pipeline runs a function on parts of the batch (microbatches, times replicas) and puts the results
together. That is exact only where the function treats each example by itself, or ends in a sum,
mean, maximum or minimum over them. The function is traced on a part and on the full batch, an
abstract interpreter runs over both traces, and every value gets a role (`batch.lattice`). Values
that no parts combine to are refused by name, never returned changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax

from layerwise_jax import _jax
from layerwise_jax.batch.interpreter import BatchInterpreter, constant_role
from layerwise_jax.batch.lattice import NotSeparable, Parts, Replicated, Role, Split
from layerwise_jax.batch.linearity import ORDERED
from layerwise_jax.batch.numbering import mixed_numberings
from layerwise_jax.batch.outputs import (
    OutputAnalysis,
    OutputRole,
    TracedOutput,
    output_words,
    roles_of_one_part,
)
from layerwise_jax.batch.pairs import BatchError, ProgramPair, pair_programs
from layerwise_jax.batch.precompute import Candidates, Precomputed, precomputed_inputs
from layerwise_jax.batch.rules.draws import Draws
from layerwise_jax.trace.flatten import flatten
from layerwise_jax.trace.flatten_policy import FOR_STAGES
from layerwise_jax.trace.layers import LayerSequence
from layerwise_jax.trace.program import Operand, Program, Value

__all__ = ["BatchAnalysis", "BatchError", "BatchOptions", "OutputRole", "analyze_batching"]


@dataclass(frozen=True)
class BatchOptions:
    """Choices of the analysis.

    With `statistics="per_microbatch"` an operation that mixes examples (the mean that batch
    normalisation subtracts) mixes those of a part. An output that depends on other mixing
    operations is judged by its shape: rows if its leading axis is as long as the batch, else as its
    word says.

    Attributes:
      reduce: a word of `outputs.Reduce`, or a tree of words that is a prefix of the outputs' tree.
      statistics: see above; None refuses operations that mix examples.
      state: positions of the outputs that are new state, which parts update in order.
      precompute: whether values of inputs only may be computed for the full batch beforehand.
    """

    reduce: Any = "auto"
    statistics: Literal["per_microbatch"] | None = None
    state: tuple[int, ...] = ()
    precompute: bool = True


@dataclass(frozen=True, eq=False)
class BatchAnalysis:
    """A function as it runs on parts of the batch.

    Attributes:
      program: program of a part. Operations that draw by shape are marked to be run at the full
        batch; values computed beforehand are additional inputs, after the function's own.
      outputs: role of every output leaf.
      in_axes: for every input of the program, 0 if parts split it, None if each gets it whole.
      precomputed: makes the additional inputs from the function's own; None if there are none.
    """

    program: Program
    outputs: tuple[OutputRole, ...]
    in_axes: tuple[int | None, ...]
    precomputed: Precomputed | None = None

    def inputs(self, leaves: Sequence[Any]) -> list[Any]:
        """Inputs of the program at the full batch, from the function's own input leaves."""
        return [*leaves, *(self.precomputed(leaves) if self.precomputed else ())]


def analyze_batching(
    layers: LayerSequence,
    in_axes: Sequence[int | None],
    parts: Parts,
    options: BatchOptions | None = None,
) -> BatchAnalysis:
    """Find out how the outputs of the full batch follow from those of its parts.

    Args:
      layers: the function, traced on one part.
      in_axes: for every input leaf, 0 if its leading axis is the batch, None if every part gets it
        whole.
      parts: full batch over one part: the number of equal parts, or Fraction(batch, size) for a
        part of another size.
      options: see `BatchOptions`.

    Raises:
      BatchError: an output would differ from that of the full batch, or its word is wrong for it.
      ValueError: `options.reduce` is no tree of words for the outputs.
    """
    options = options or BatchOptions()
    axes = tuple(in_axes)
    # One part is the whole batch: nothing is split, so no second trace is made.
    if parts == 1:
        program = _with_constant_outputs(layers.program)
        return BatchAnalysis(program, _roles_of_one_part(layers, axes, options), axes)
    # The same operations in both traces, or the function's structure follows the batch's length.
    pair = _pair(layers, _trace_full(layers, axes, parts))
    walk, roles = _interpret(pair, axes, parts, options)
    outputs = _traced_outputs(layers, pair, roles, axes, walk.precomputed, options)
    judge = OutputAnalysis(parts, options.statistics is not None)
    kinds = tuple(
        judge.state(output) if position in options.state else judge.output(output)
        for position, output in enumerate(outputs)
    )
    # Values computed beforehand become inputs after the function's own.
    program, precomputed = precomputed_inputs(pair, _as_run(pair.micro, walk), walk.precomputed)
    in_axes = (*axes, *(precomputed.in_axes if precomputed else ()))
    return BatchAnalysis(_with_constant_outputs(program), kinds, in_axes, precomputed)


def _as_run(program: Program, walk: BatchInterpreter) -> Program:
    """The program as it runs on a part: draws at the full batch, corrected derivative rules."""
    ops = [
        replace(op, eqn=walk.corrected.get(i, op.eqn), full_rows=walk.draws.full_rows.get(i))
        for i, op in enumerate(program.ops)
    ]
    return replace(program, ops=tuple(ops))


def _with_constant_outputs(program: Program) -> Program:
    """The program with outputs that are literals (`return loss, 0.0`) as constants."""
    avals = list(program.avals)
    constants = dict(program.constants)
    outputs: list[Operand] = []
    for output in program.outputs:
        if isinstance(output, _jax.Literal):
            aval: Any = output.aval
            # The literal becomes a new value, numbered after all others.
            constants[len(avals)] = jax.numpy.asarray(output.val, aval.dtype)
            outputs.append(len(avals))
            avals.append(aval)
        else:
            outputs.append(output)
    return replace(program, avals=tuple(avals), constants=constants, outputs=tuple(outputs))


def _roles_of_one_part(
    layers: LayerSequence, in_axes: Sequence[int | None], options: BatchOptions
) -> tuple[OutputRole, ...]:
    signature, program = layers.signature, layers.program
    inputs = zip(signature.inputs_avals, in_axes, strict=True)
    # Length of the first split input; None if nothing is split.
    batch = next((aval.shape[0] for aval, axis in inputs if axis is not None), None)
    from_inputs = _values_from(program, program.inputs)
    split = zip(program.inputs, in_axes, strict=True)
    from_batch = _values_from(program, [value for value, axis in split if axis is not None])
    names = _output_names(layers)
    words, is_own_word = _words(layers, options)
    outputs = [
        TracedOutput(
            name=name,
            role=Replicated(),
            micro=aval,
            full=aval,
            from_batch=from_batch(operand),
            from_inputs=from_inputs(operand),
            word=word,
            is_own_word=is_own_word,
        )
        for name, operand, aval, word in zip(
            names, program.outputs, signature.outputs_avals, words, strict=True
        )
    ]
    return roles_of_one_part(outputs, batch, options.state)


def _words(layers: LayerSequence, options: BatchOptions) -> tuple[list[str], bool]:
    tree = layers.signature.outputs_tree
    outputs = jax.tree.unflatten(tree, list(range(tree.num_leaves)))
    words, is_own_word = output_words(options.reduce, outputs)
    # Mutated variables are appended to the outputs and have no word from the user.
    return words + ["auto"] * len(layers.signature.mutated), is_own_word


def _trace_full(layers: LayerSequence, in_axes: Sequence[int | None], parts: Parts) -> Program:
    signature = layers.signature
    # Weights keep their shapes; split inputs [b, ...] become [parts * b, ...].
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
    return flatten(jaxpr, len(params), FOR_STAGES, layers.program.captured)


def _abstract(aval: Any, parts: Parts) -> jax.ShapeDtypeStruct:
    shape = aval.shape if parts == 1 else (int(aval.shape[0] * parts), *aval.shape[1:])
    return jax.ShapeDtypeStruct(shape, aval.dtype, weak_type=aval.weak_type)


def _pair(layers: LayerSequence, full: Program) -> ProgramPair:
    """The pair of programs; captured arrays that follow the length of the batch are constants."""
    micro = layers.program
    # Arrays that the two traces capture at other lengths: an `arange(batch)` of the caller.
    following = [
        leaf
        for leaf, array in micro.captured.items()
        if leaf not in full.captured
        or not isinstance(constant_role(array, full.captured[leaf]), Replicated)
    ]
    return pair_programs(
        micro.captured_as_constants(following), full.captured_as_constants(following)
    )


def _interpret(
    pair: ProgramPair, in_axes: Sequence[int | None], parts: Parts, options: BatchOptions
) -> tuple[BatchInterpreter, list[Role]]:
    """The interpreter after its run, and the roles of the outputs.

    Runs again while it finds an iota that numbers the full batch and must number each part, or a
    value of inputs only that must be computed for the full batch beforehand.
    """
    inputs = zip(pair.full.inputs, in_axes, strict=True)
    given: dict[Value, Role] = dict.fromkeys(pair.full.weights, Replicated())
    given.update({value: Replicated() if axis is None else Split(axis) for value, axis in inputs})
    per_microbatch = options.statistics is not None
    # Both sets only grow, and the program is finite: the loop ends.
    per_part: frozenset[int] = frozenset()
    beforehand: dict[Value, Role] = {}
    while True:
        draws = Draws(per_part, per_microbatch)
        candidates = Candidates(pair, parts, beforehand, only_draws=per_microbatch)
        # A fresh interpreter every time: roles of the last run may rest on wrong iotas.
        walk = BatchInterpreter(parts, per_microbatch, draws=draws, candidates=candidates)
        roles = walk.outputs(pair, given)
        # Rows that were sorted and not put back: those of inputs can be sorted beforehand.
        if any(isinstance(x, NotSeparable) and x.why.startswith(ORDERED) for x in roles):
            # An order over all examples reaches an output: precompute it if it follows from inputs.
            candidates.note_orders(walk.roles)
        found = frozenset()
        if per_microbatch:
            found = mixed_numberings(pair, walk.roles, draws.numbered, walk.statistics)
        if not found and (candidates.is_settled or not options.precompute):
            return walk, roles
        per_part |= found  # an iota of `per_part` is not found again
        if options.precompute:
            beforehand = candidates.following()


def _traced_outputs(
    layers: LayerSequence,
    pair: ProgramPair,
    roles: Sequence[Role],
    in_axes: Sequence[int | None],
    beforehand: Iterable[Value],
    options: BatchOptions,
) -> list[TracedOutput]:
    inputs = zip(pair.full.inputs, in_axes, strict=True)
    from_batch = _values_from(pair.full, [value for value, axis in inputs if axis is not None])
    from_totals = _values_from(pair.full, beforehand)
    names = _output_names(layers)
    words, is_own_word = _words(layers, options)
    operands = zip(pair.micro.outputs, pair.full.outputs, strict=True)
    return [
        TracedOutput(
            name=name,
            role=role,
            micro=pair.micro.aval(m),
            full=pair.full.aval(f),
            from_batch=from_batch(f),
            from_totals=from_totals(f),
            word=word,
            is_own_word=is_own_word,
        )
        for name, role, word, (m, f) in zip(names, roles, words, operands, strict=True)
    ]


def _output_names(layers: LayerSequence) -> list[str]:
    """Name of every output leaf in a message."""
    tree = layers.signature.outputs_tree
    paths, _, _ = _jax.key_paths(jax.tree.unflatten(tree, list(range(tree.num_leaves))))
    names = [f"output {jax.tree_util.keystr(path)}" if path else "the output" for path in paths]
    params = layers.signature.params_names
    return names + [f"the new value of {params[leaf]}" for leaf in layers.signature.mutated]


def _values_from(program: Program, sources: Iterable[Value]) -> Callable[[Operand], bool]:
    """Test of whether an operand depends on one of these values."""
    values = set(sources)
    for op in program.ops:
        # Operations are in program order, so one pass finds all dependents.
        if values.intersection(op.values):
            values.update(op.results)
    return lambda operand: not isinstance(operand, _jax.Literal) and operand in values
