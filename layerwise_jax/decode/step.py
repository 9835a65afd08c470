"""Decode step as a program whose cache is state: traced, cut into stages, placed and wired.

    step_fn(params, cache, tokens, positions) -> (logits, cache)

The cache is placed with the stage that reads it, like weights, and each stage replaces its part in
every tick. The sampler belongs to the last layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from layerwise_jax import _jax
from layerwise_jax.decode.sampling import Sampler
from layerwise_jax.decode.state_order import renew_early
from layerwise_jax.stage.align import Alignment, align_stages
from layerwise_jax.stage.checks import check_stageable
from layerwise_jax.stage.cut import CutError, Stage, cut_stages
from layerwise_jax.stage.placement import Placement
from layerwise_jax.stage.slots import assign_slots
from layerwise_jax.stage.staged_program import StagedProgram
from layerwise_jax.stage.state import check_carried
from layerwise_jax.stage.wiring import wire
from layerwise_jax.trace.flatten import flatten
from layerwise_jax.trace.flatten_policy import FORWARD_ONLY
from layerwise_jax.trace.layer_search import find_layers
from layerwise_jax.trace.layers import LayerSequence, Signature
from layerwise_jax.trace.modules import modules_of, path_names
from layerwise_jax.trace.mutation import call_unmutated
from layerwise_jax.trace.program import Operand, Weight, nbytes

StepFunction = Callable[[Any, Any, Any, Any], tuple[Any, Any]]

# Positions of a step's inputs behind parameters and cache.
TOKENS, POSITIONS, KEYS = range(3)


@dataclass(frozen=True, eq=False)
class StepProgram:
    """A step cut into stages.

    Attributes:
      loop: stages, wiring and placement; the cache is among the weights, as state.
      body_state: for every cache slot of the common body, the result of the body that replaces it.
      own_state: for every stage, values from outside the common body that replace cache, by slot.
      sequences_are_independent: whether sequences can come and go one by one: every leaf of the
        cache is [sequences, ...], and no operation mixes them.
    """

    loop: StagedProgram
    body_state: Mapping[int, int]
    own_state: Sequence[Mapping[int, Operand]]
    sequences_are_independent: bool


def trace_step(
    step_fn: StepFunction,
    sampler: Sampler,
    params: Any,
    cache: Any,
    num_sequences: int,
    axes: Mapping[str, int] | None = None,
    prompt_length: int | None = None,
) -> tuple[LayerSequence, dict[int, Weight]]:
    """The layers of a step with the sampler behind it, and the cache leaf that each output renews.

    Args:
      step_fn: the step, or with `prompt_length` the function that reads prompts.
      sampler: draws the next tokens.
      params: the parameters, arrays or `jax.ShapeDtypeStruct`.
      cache: the cache of one group, arrays or types.
      num_sequences: sequences of a group.
      axes: sizes of the mesh axes over which the step has collectives, by name.
      prompt_length: None for a step of one token. Otherwise tokens are int32[sequences,
        prompt_length], positions are lengths int32[sequences], and logits are those of each
        prompt's last token.

    Raises:
      ValueError: the outputs are not logits float[sequences, vocabulary] and a cache of the input's
        types.
    """
    name = "step_fn" if prompt_length is None else "prefill_fn"

    def step(both: Any, tokens: Any, positions: Any, keys: Any) -> tuple[Any, Any]:
        logits, new = call_unmutated(step_fn, both[0], both[1], tokens, positions)
        check_step_outputs(name, logits, new, both[1], num_sequences)
        # Logits come from the token at this position: the last of a prompt of that length.
        last = positions if prompt_length is None else positions - 1
        return sampler(logits, keys, last), new

    # One tree: parameters and cache are both weights of the program, the cache being state.
    both = (params, cache)
    inputs = step_inputs(num_sequences, prompt_length)
    paths, leaves, tree = _jax.key_paths(both)
    traced = jax.make_jaxpr(step, axis_env=list((axes or {}).items()), return_shape=True)
    jaxpr, outputs = traced(both, *inputs)
    # No gradient is taken, and derivative rules would make equal layers differ.
    program = flatten(jaxpr, len(leaves), FORWARD_ONLY)
    # Outputs behind the first are the new cache.
    program = renew_early(program, range(1, len(program.outputs)))
    output_leaves, outputs_tree = jax.tree.flatten(outputs)
    avals = [var.aval for var in jaxpr.invars]
    signature = Signature(
        params_tree=tree,
        params_avals=tuple(avals[: len(leaves)]),
        params_paths=tuple(paths),
        inputs_tree=jax.tree.structure(inputs),
        inputs_avals=tuple(avals[len(leaves) :]),
        outputs_tree=outputs_tree,
        outputs_avals=tuple(output_leaves),
    )
    num_params = len(jax.tree.leaves(params))
    # A cache leaf belongs to the layer that reads it, whatever its path.
    modules = modules_of([path_names(path[1:]) for path in paths[:num_params]])
    layers = find_layers(program, [*modules, *[None] * (len(leaves) - num_params)])
    sequence = LayerSequence(step, program, layers, signature)
    return sequence, _find_cache(sequence, num_params)


def step_inputs(num_sequences: int, prompt_length: int | None = None) -> tuple[Any, Any, Any]:
    """Types of tokens, positions (lengths, with `prompt_length`) and key data."""
    # Key data, not keys: collectives and arithmetic take integers.
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    ints = jax.ShapeDtypeStruct((num_sequences,), jnp.int32)
    length = () if prompt_length is None else (prompt_length,)
    tokens = jax.ShapeDtypeStruct((num_sequences, *length), jnp.int32)
    return tokens, ints, jax.ShapeDtypeStruct((num_sequences, *key.shape), key.dtype)


def check_step_outputs(name: str, logits: Any, new: Any, cache: Any, num_sequences: int) -> None:
    """Require logits and a cache of the types of the given one.

    Raises:
      ValueError: other outputs.
    """
    if getattr(logits, "ndim", None) != 2 or logits.shape[0] != num_sequences:
        is_array = hasattr(logits, "shape")
        got = f"{logits.dtype}{list(logits.shape)}" if is_array else type(logits).__name__
        raise ValueError(
            f"{name} must return logits float[{num_sequences}, vocabulary], one row a sequence, "
            f"got {got}. Return the logits of the last token only."
        )
    got, expected = (
        jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree) for tree in (new, cache)
    )
    if jax.tree.structure(new) != jax.tree.structure(cache) or got != expected:
        raise ValueError(
            f"{name} must return a cache of the types that it is given.\n"
            f"  expected: {expected}\n  got:      {got}"
        )


def _find_cache(layers: LayerSequence, num_params: int) -> dict[int, Weight]:
    """The cache leaf of every output behind the tokens, by the output's position."""
    program = layers.program
    held = {weight.leaf: weight for weight in program.weights.values() if weight.start is None}
    found = {}
    for position in range(1, len(program.outputs)):
        leaf = num_params + position - 1
        if leaf not in held:
            raise CutError(
                "A cache leaf must belong to one layer, got "
                f"cache{layers.signature.params_names[leaf][3:]}, of which layers use slices. Give "
                "every layer a separate leaf."
            )
        found[position] = held[leaf]
    return found


def renewed(layers: LayerSequence, cache: Mapping[int, Weight]) -> dict[int, Weight]:
    """The cache leaves that the step changes, by output. A leaf that is only read (the memory of
    cross attention) belongs to no single stage.
    """
    program = layers.program
    # An output that is the leaf itself was not changed.
    values = {weight: value for value, weight in program.weights.items()}
    return {
        position: weight
        for position, weight in cache.items()
        if program.outputs[position] != values[weight]
    }


def stage_step(
    layers: LayerSequence,
    cache: Mapping[int, Weight],
    boundaries: Sequence[int],
    kinds: Mapping[Weight, Hashable] | None = None,
    axes: Collection[str] = (),
) -> StepProgram:
    """The step cut at `boundaries`, its stages aligned, placed and wired.

    Args:
      layers: the layers, from `trace_step`.
      cache: the cache leaf of every output, from `trace_step`.
      boundaries: indices of layers.
      kinds: weights of different kinds share no slot.
      axes: mesh axes over which the step may communicate.

    Raises:
      CutError: a later stage reads the tokens again, or a part of the cache is used on two stages.
    """
    stages = cut_step(layers, cache, boundaries, axes)
    alignment = align_stages(layers, boundaries, stages)
    placement = assign_slots(
        layers.program, stages, alignment, layers.signature, len(stages), state=cache, kinds=kinds
    )
    return assemble(layers, stages, alignment, placement, cache)


def cut_step(
    layers: LayerSequence,
    cache: Mapping[int, Weight],
    boundaries: Sequence[int],
    axes: Collection[str],
) -> tuple[Stage, ...]:
    """The stages between `boundaries`, checked as `stage_step` says."""
    check_stageable(layers.program, axes)
    stages = cut_stages(layers, boundaries)
    check_carried(renewed(layers, cache), stages)
    _check_tokens(layers, stages)
    return stages


def assemble(
    layers: LayerSequence,
    stages: tuple[Stage, ...],
    alignment: Alignment,
    placement: Placement,
    cache: Mapping[int, Weight],
    body_slots: tuple[int, ...] | None = None,
) -> StepProgram:
    """The stages wired; `body_slots` where the placement was made for another program."""
    if body_slots is not None:
        placement = replace(placement, body_slots=(body_slots,))
    # Tokens are the only output that leaves a stage; the cache stays as state.
    shown = [
        replace(stage, outputs={p: x for p, x in stage.outputs.items() if p == 0})
        for stage in stages
    ]
    wiring = wire(replace(layers.program, outputs=layers.program.outputs[:1]), shown, alignment)
    loop = StagedProgram(
        program=layers.program,
        stages=stages,
        alignment=alignment,
        wiring=wiring,
        placement=placement,
        num_devices=len(stages),
        num_microbatches=1,
        in_axes=(None,) * 3,
        state=dict(cache),
    )
    # The body is common to all stages: it replaces the same slots on each.
    body, own = _split_state(loop, renewed(layers, cache))
    avals = [
        layers.program.avals[value]
        for value, weight in layers.program.weights.items()
        if weight in cache.values()
    ]
    num_sequences = layers.signature.inputs_avals[TOKENS].shape[0]
    return StepProgram(loop, body, own, all(aval.shape[:1] == (num_sequences,) for aval in avals))


def _check_tokens(layers: LayerSequence, stages: Sequence[Stage]) -> None:
    """Require that only the first stage reads the tokens: later ones work on older tokens."""
    tokens = layers.program.inputs[TOKENS]
    for s, stage in enumerate(stages[1:], start=1):
        if tokens in stage.inputs:
            raise CutError(
                f"Only the first stage may read the tokens, got a use in stage {s} "
                f"({stage.layers[0]} to {stage.layers[-1]}). Choose boundaries that keep every use "
                "in the first stage."
            )


def _split_state(
    loop: StagedProgram, state: Mapping[int, Weight]
) -> tuple[dict[int, int], list[dict[int, Operand]]]:
    """The cache's new values: results of the common body by slot, and by stage the values of its
    own operations by slot.
    """
    body: dict[int, int] = {}
    own: list[dict[int, Operand]] = []
    for s, stage in enumerate(loop.stages):
        # Value of this stage -> number of the body's result.
        made = {x: j for j, x in enumerate(loop.alignment.parts[s].shape.made)}
        slot_of = loop.placement.slot_of(s)
        new = {slot_of[state[p]]: x for p, x in stage.outputs.items() if p in state}
        in_body = {j: made[x] for j, x in new.items() if isinstance(x, int) and x in made}
        assert s == 0 or in_body == body, "equal bodies replace their caches alike"
        body = in_body
        own.append({j: x for j, x in new.items() if j not in in_body})
    return body, own


def own_bytes(loop: StagedProgram) -> int:
    """Bytes of the weights that stages use outside of the common body."""
    avals = loop.program.avals
    # Slots that every stage uses in its body are read anyway.
    body = {j for slots in loop.placement.body_slots for j in slots}
    held = {x for stage in loop.stages for x in stage.weights}
    slots = [loop.placement.slot_of(s) for s in range(loop.num_stages)]
    return sum(
        nbytes(avals[x])
        for x in held
        if any(slot.get(loop.program.weights[x], -1) not in body | {-1} for slot in slots)
    )
