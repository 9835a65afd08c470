"""Prompts read at once: a second program over the stages, weights and caches of a decode ring.

    prefill_fn(params, cache, tokens, lengths) -> (logits, cache)

The groups are the microbatches of one pass through the stages. The pass shares the step's
placement, so that nothing is held twice: both are cut at the same layers, and each stage finds its
weights and caches in the step's slots.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jax.sharding import Mesh

from layerwise_jax._arguments import checked_int32
from layerwise_jax.decode.loop import RingLoop
from layerwise_jax.decode.state import rotated
from layerwise_jax.decode.step import StepProgram, assemble, cut_step
from layerwise_jax.decode.transport import Permute
from layerwise_jax.decode.values import Prompts
from layerwise_jax.stage.align import Alignment, align_stages
from layerwise_jax.stage.cut import CutError, Stage
from layerwise_jax.stage.placement import Placement
from layerwise_jax.trace.layers import LayerSequence
from layerwise_jax.trace.program import Weight


@dataclass(frozen=True, eq=False)
class Prefill:
    """The pass that reads prompts.

    Attributes:
      ring: its loop, over the slots and places of the decode ring's.
      length: tokens of a prompt that it reads.
    """

    ring: RingLoop
    length: int

    @classmethod
    def of(
        cls,
        step_layers: LayerSequence,
        ring: RingLoop,
        layers: LayerSequence,
        cache: Mapping[int, Weight],
        length: int,
        axes: Collection[str] = (),
    ) -> Prefill:
        """The pass over the places of a ring.

        Args:
          step_layers: the layers of the ring's step.
          ring: the ring.
          layers: the layers of the pass, the sampler in the last.
          cache: its outputs that are new values of the cache.
          length: tokens of a prompt that it reads.
          axes: mesh axes over which it may communicate.

        Raises:
          CutError: it has other layers than the step, or uses weights or cache on other stages.
        """
        if layers.names != step_layers.names:
            raise CutError(
                f"prefill_fn has the layers {layers.names}, the step has {step_layers.names}. "
                "Write both so that they "
                "use the same modules in the same order, or leave prefill_fn out."
            )
        step = _stage_prefill(layers, cache, ring.step, axes)
        # A stage's own operations are branched to: a pass is long, and a branch is not.
        # Its messages are long and few, so bandwidth counts, not latency: collectives.
        loop = replace(ring, step=step, selects=False, transport=Permute(), rounds_per_iteration=1)
        return cls(loop, length)

    def prompts(self, mesh: Mesh, tokens: Any, lengths: Any, num_sequences: int) -> Prompts:
        """Prompts as the devices hold them: see `DecodeRing.prefill`.

        Raises:
          ValueError: other shapes, or lengths that this ring cannot read.
        """
        shape = (self.ring.num_groups, num_sequences)
        tokens = checked_int32("prompts", tokens, (*shape, self.length))
        lengths = checked_int32("lengths", lengths, shape)
        self._check_lengths(lengths)
        return Prompts(rotated(self.ring, mesh, tokens), rotated(self.ring, mesh, lengths))

    def _check_lengths(self, lengths: np.ndarray) -> None:
        read = lengths[lengths.any(axis=1)]
        if (read < 1).any() or (read > self.length).any():
            raise ValueError(
                f"lengths came as {lengths.tolist()}; 1 to {self.length} are wanted, or 0 for all "
                "sequences of a group "
                "that reads nothing."
            )
        if not self.ring.step.sequences_are_independent and (read != self.length).any():
            raise ValueError(
                f"lengths came as {lengths.tolist()}; the sequences of a group share a part of "
                "the cache, so that all "
                f"must have the length {self.length}, or 0."
            )


def check_prefill(prefill_fn: Callable | None, prefill_length: int | None) -> None:
    """Refuse a function without a length and a length without a function."""
    if (prefill_fn is None) != (prefill_length is None):
        raise ValueError(
            f"prefill_length is {prefill_length}, prefill_fn is "
            f"{'not ' if prefill_fn else ''}None; a function and the "
            "number of tokens that it reads are wanted, or neither."
        )


def _stage_prefill(
    layers: LayerSequence, cache: Mapping[int, Weight], step: StepProgram, axes: Collection[str]
) -> StepProgram:
    """The pass cut where the step is cut, in the step's slots."""
    boundaries = np.cumsum([0, *(len(stage.layers) for stage in step.loop.stages)]).tolist()
    stages = cut_step(layers, cache, boundaries, axes)
    _check_held(layers, cache, stages, step)
    alignment = align_stages(layers, boundaries, stages)
    slots = _body_slots(layers, cache, stages, alignment, step.loop.placement)
    if slots is None:
        alignment, slots = align_stages(layers, boundaries, stages, with_body=False), ()
    program = assemble(layers, stages, alignment, step.loop.placement, cache, slots)
    return replace(program, sequences_are_independent=step.sequences_are_independent)


def _check_held(
    layers: LayerSequence, cache: Mapping[int, Weight], stages: tuple[Stage, ...], step: StepProgram
) -> None:
    names, state, copies = (
        layers.signature.params_names,
        set(step.loop.state.values()),
        step.loop.placement.copies(),
    )
    for s, stage in enumerate(stages):
        held = step.loop.placement.slot_of(s)
        renewed = {cache[p] for p in stage.outputs if p in cache}
        wrong = [weight for weight in (*stage.weights.values(), *renewed) if weight not in held]
        wrong += [weight for weight in renewed if weight not in state or len(copies[weight]) > 1]
        if wrong:
            raise CutError(
                f"prefill_fn uses {names[wrong[0].leaf][3:]} in stage {s} ({stage.layers[0]} to "
                f"{stage.layers[-1]}), "
                "where the step does not, or does not replace it. Use it in the same layers, or "
                "leave prefill_fn out."
            )


def _body_slots(
    layers: LayerSequence,
    cache: Mapping[int, Weight],
    stages: tuple[Stage, ...],
    alignment: Alignment,
    placement: Placement,
) -> tuple[int, ...] | None:
    """The slots of the common body's weights; None if its weights or caches stand in different ones
    on some stages.
    """
    found = set()
    for s, (stage, part) in enumerate(zip(stages, alignment.parts, strict=True)):
        slot_of, made = placement.slot_of(s), {x: j for j, x in enumerate(part.shape.made)}
        weights = tuple(slot_of[layers.program.weights[x]] for x in part.shape.weights)
        new = {
            p: x
            for p, x in stage.outputs.items()
            if p in cache and isinstance(x, int) and x in made
        }
        found.add((weights, frozenset((slot_of[cache[p]], made[x]) for p, x in new.items())))
    return found.pop()[0] if len(found) == 1 else None
