"""A step of token generation as a program whose cache is state: traced, cut into stages, placed and
wired.

    step_fn(params, cache, tokens, positions) -> (logits, cache)

The cache is placed with the stage that reads it, as weights are, and each stage's part of it is
replaced in every tick. What the sampler makes of the logits belongs to the last layer.
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
from layerwise_jax.trace.flatten import FORWARD_ONLY, flatten
from layerwise_jax.trace.layer_search import find_layers
from layerwise_jax.trace.layers import LayerSequence, Signature
from layerwise_jax.trace.modules import modules_of, path_names
from layerwise_jax.trace.mutation import call_unmutated
from layerwise_jax.trace.program import Operand, Weight, nbytes

StepFunction = Callable[[Any, Any, Any, Any], tuple[Any, Any]]

# What goes into a step besides parameters and cache, in this order.
TOKENS, POSITIONS, KEYS = range(3)


@dataclass(frozen=True, eq=False)
class StepProgram:
    """A step, cut into stages.

    Attributes:
      loop: its stages, wiring and placement; the cache is among the weights, as state.
      body_state: for slots of the common body that hold cache, which result of the body replaces
        it.
      own_state: for every stage, the slots of cache that its own operations replace, and by which
        values.
      sequences_are_independent: whether sequences can come and go one by one: every leaf of the
        cache has a row a sequence, and no operation mixes them.
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
    """The layers of a step followed by the sampler, and which outputs are new values of the cache.

    Args:
      step_fn: the step.
      sampler: draws the next tokens.
      params: the parameters, arrays or `jax.ShapeDtypeStruct`.
      cache: the cache of one group of sequences, likewise.
      num_sequences: sequences of a group.
      axes: the mesh axes, with their sizes, over which the step has collectives of its own.
      prompt_length: None for a step of one token. Otherwise the step reads so many tokens of every
        sequence at once, int32[sequences, prompt_length], is given how many of them count instead
        of a position, and returns the logits of the last that does.

    Raises:
      ValueError: the step does not return logits float[sequences, vocabulary] and a cache like the
        one that it got.
    """

    def step(both: Any, tokens: Any, positions: Any, keys: Any) -> tuple[Any, Any]:
        logits, new = call_unmutated(step_fn, both[0], both[1], tokens, positions)
        check_step_outputs(
            "The step" if prompt_length is None else "prefill_fn",
            logits,
            new,
            both[1],
            num_sequences,
        )
        return sampler(logits, keys, positions if prompt_length is None else positions - 1), new

    both = (params, cache)
    inputs = step_inputs(num_sequences, prompt_length)
    paths, leaves, tree = _jax.key_paths(both)
    traced = jax.make_jaxpr(step, axis_env=list((axes or {}).items()), return_shape=True)
    jaxpr, outputs = traced(both, *inputs)
    # No gradient is taken; a derivative's rule could only keep equal layers apart.
    program = flatten(jaxpr, len(leaves), FORWARD_ONLY)
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
    modules = modules_of([path_names(path[1:]) for path in paths[:num_params]])
    layers = find_layers(program, [*modules, *[None] * (len(leaves) - num_params)])
    sequence = LayerSequence(step, program, layers, signature)
    return sequence, _find_cache(sequence, num_params)


def step_inputs(num_sequences: int, prompt_length: int | None = None) -> tuple[Any, Any, Any]:
    """Types of tokens, of positions (or of lengths, where prompts are read at once) and of key
    data.
    """
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    ints = jax.ShapeDtypeStruct((num_sequences,), jnp.int32)
    tokens = (
        ints
        if prompt_length is None
        else jax.ShapeDtypeStruct((num_sequences, prompt_length), jnp.int32)
    )
    return tokens, ints, jax.ShapeDtypeStruct((num_sequences, *key.shape), key.dtype)


def check_step_outputs(name: str, logits: Any, new: Any, cache: Any, num_sequences: int) -> None:
    """Refuse what is not logits and a cache like the one that was given."""
    if getattr(logits, "ndim", None) != 2 or logits.shape[0] != num_sequences:
        came = (
            f"{logits.dtype}{list(logits.shape)}"
            if hasattr(logits, "shape")
            else type(logits).__name__
        )
        raise ValueError(
            f"{name} returned {came} for logits; float[{num_sequences}, vocabulary] is wanted: "
            "one row a sequence, "
            "for the last token that it was given."
        )
    came, wanted = (
        jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree) for tree in (new, cache)
    )
    if jax.tree.structure(new) != jax.tree.structure(cache) or came != wanted:
        raise ValueError(
            f"{name} returned another cache than it got.\n  came:   {came}\n  wanted: {wanted}"
        )


def _find_cache(layers: LayerSequence, num_params: int) -> dict[int, Weight]:
    """The output that is the next value of every leaf of the cache."""
    program = layers.program
    held = {weight.leaf: weight for weight in program.weights.values() if weight.start is None}
    found = {}
    for position in range(1, len(program.outputs)):
        leaf = num_params + position - 1
        if leaf not in held:
            raise CutError(
                f"The cache{layers.signature.params_names[leaf][3:]} is used in slices, which "
                "live on several stages. "
                "Give every layer a leaf of its own."
            )
        found[position] = held[leaf]
    return found


def renewed(layers: LayerSequence, cache: Mapping[int, Weight]) -> dict[int, Weight]:
    """What of the cache does not come back as it was: a memory that layers only read is no one
    stage's.
    """
    program = layers.program
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

    Weights of different kinds share no slot; the step may communicate over `axes`.

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
    """The stages between `boundaries`, if a ring can run them: see `stage_step`."""
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
    body, own = _split_state(loop, renewed(layers, cache))
    avals = [
        layers.program.avals[value]
        for value, weight in layers.program.weights.items()
        if weight in cache.values()
    ]
    num_sequences = layers.signature.inputs_avals[TOKENS].shape[0]
    return StepProgram(loop, body, own, all(aval.shape[:1] == (num_sequences,) for aval in avals))


def _check_tokens(layers: LayerSequence, stages: Sequence[Stage]) -> None:
    tokens = layers.program.inputs[TOKENS]
    for s, stage in enumerate(stages[1:], start=1):
        if tokens in stage.inputs:
            raise CutError(
                f"Stage {s} ({stage.layers[0]} to {stage.layers[-1]}) reads the tokens, which "
                "only the first stage "
                "has. Choose boundaries that keep every use of them in the first stage."
            )


def _split_state(
    loop: StagedProgram, state: Mapping[int, Weight]
) -> tuple[dict[int, int], list[dict[int, Operand]]]:
    """What replaces the cache: results of the common body by slot, and for every stage the values
    of its own.
    """
    body: dict[int, int] = {}
    own: list[dict[int, Operand]] = []
    for s, stage in enumerate(loop.stages):
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
    body = {j for slots in loop.placement.body_slots for j in slots}
    held = {x for stage in loop.stages for x in stage.weights}
    slots = [loop.placement.slot_of(s) for s in range(loop.num_stages)]
    return sum(
        nbytes(avals[x])
        for x in held
        if any(slot.get(loop.program.weights[x], -1) not in body | {-1} for slot in slots)
    )
