"""Prefill: a second program over the stages, weights and caches of a decode ring that reads whole
prompts.

    prefill_fn(params, cache, tokens, lengths) -> (logits, cache)

The groups are the microbatches of one pass through the stages. Prefill and step are cut at the same
layers and share one placement: every stage finds its weights and caches in the step's slots.
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
    """The prefill program of a ring.

    Attributes:
      ring: its loop, over the slots and places of the decode ring's loop.
      length: tokens of a prompt that it reads at most.
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
        """The prefill of a ring.

        Args:
          step_layers: layers of the ring's step.
          ring: the ring.
          layers: layers of prefill_fn, the sampler in the last.
          cache: its outputs that are new values of the cache.
          length: tokens of a prompt that it reads at most.
          axes: mesh axes over which it may communicate.

        Raises:
          CutError: its layers differ from the step's, or a stage uses weights or caches that the
            step's stage does not.
        """
        if layers.names != step_layers.names:
            raise CutError(
                f"prefill_fn must have the layers of step_fn, {step_layers.names}, got "
                f"{layers.names}. Use the same modules in the same order in both, or leave "
                "prefill_fn out."
            )
        step = _stage_prefill(layers, cache, ring.step, axes)
        # The cost of a branch is small against a pass over prompts: no stage runs what is not its
        # own. Messages are large and few, so bandwidth counts: collectives.
        loop = replace(ring, step=step, selects=False, transport=Permute(), rounds_per_iteration=1)
        return cls(loop, length)

    def prompts(self, mesh: Mesh, tokens: Any, lengths: Any, num_sequences: int) -> Prompts:
        """Prompts on the devices, rotated as the groups are; arguments of `DecodeRing.prefill`.

        Raises:
          ValueError: other shapes, or lengths that this ring cannot read.
        """
        # [groups, sequences]
        shape = (self.ring.num_groups, num_sequences)
        tokens = checked_int32("prompts", tokens, (*shape, self.length))
        lengths = checked_int32("lengths", lengths, shape)
        self._check_lengths(lengths)
        return Prompts(rotated(self.ring, mesh, tokens), rotated(self.ring, mesh, lengths))

    def _check_lengths(self, lengths: np.ndarray) -> None:
        read = lengths[lengths.any(axis=1)]  # [groups that read, sequences]
        if (read < 1).any() or (read > self.length).any():
            raise ValueError(
                f"lengths must be 1 to {self.length} for each sequence of a group, or 0 for all of "
                f"a group that reads nothing, got {lengths.tolist()}."
            )
        if not self.ring.step.sequences_are_independent and (read != self.length).any():
            raise ValueError(
                f"lengths must be {self.length}, or 0 for a group that reads nothing, got "
                f"{lengths.tolist()}: the sequences of a group share a part of the cache."
            )


def check_prefill(prefill_fn: Callable | None, prefill_length: int | None) -> None:
    """Require both arguments or neither.

    Raises:
      ValueError: one is missing.
    """
    if (prefill_fn is None) != (prefill_length is None):
        raise ValueError(
            "prefill_fn and prefill_length must be given together, got prefill_fn="
            f"{'None' if prefill_fn is None else 'a function'}, prefill_length={prefill_length}."
        )


def _stage_prefill(
    layers: LayerSequence, cache: Mapping[int, Weight], step: StepProgram, axes: Collection[str]
) -> StepProgram:
    """The prefill program, cut where the step is cut and placed in the step's slots."""
    boundaries = np.cumsum([0, *(len(stage.layers) for stage in step.loop.stages)]).tolist()
    stages = cut_step(layers, cache, boundaries, axes)
    _check_held(layers, cache, stages, step)
    alignment = align_stages(layers, boundaries, stages)
    # The step's body may hold its weights in other slots than this program's would.
    slots = _body_slots(layers, cache, stages, alignment, step.loop.placement)
    if slots is None:  # one body cannot serve stages whose slots differ: all is a stage's own
        alignment, slots = align_stages(layers, boundaries, stages, with_body=False), ()
    program = assemble(layers, stages, alignment, step.loop.placement, cache, slots)
    return replace(program, sequences_are_independent=step.sequences_are_independent)


def _check_held(
    layers: LayerSequence, cache: Mapping[int, Weight], stages: tuple[Stage, ...], step: StepProgram
) -> None:
    """Require that every stage of the prefill uses and renews what the step's stage does."""
    names = layers.signature.params_names
    state = set(step.loop.state.values())
    copies = step.loop.placement.copies()
    for s, stage in enumerate(stages):
        held = step.loop.placement.slot_of(s)
        # A cache that several stages hold copies of is only read.
        renewed = {cache[p] for p in stage.outputs if p in cache}
        wrong = [weight for weight in (*stage.weights.values(), *renewed) if weight not in held]
        wrong += [weight for weight in renewed if weight not in state or len(copies[weight]) > 1]
        if wrong:
            raise CutError(
                f"prefill_fn must use and replace what step_fn does in each stage, got "
                f"{names[wrong[0].leaf][3:]} in stage {s} ({stage.layers[0]} to "
                f"{stage.layers[-1]}). Use it in the same layers, or leave prefill_fn out."
            )


def _body_slots(
    layers: LayerSequence,
    cache: Mapping[int, Weight],
    stages: tuple[Stage, ...],
    alignment: Alignment,
    placement: Placement,
) -> tuple[int, ...] | None:
    """The slots of the common body's weights; None if stages differ in the slots of its weights or
    caches.
    """
    found = set()
    for s, (stage, part) in enumerate(zip(stages, alignment.parts, strict=True)):
        slot_of = placement.slot_of(s)
        made = {x: j for j, x in enumerate(part.shape.made)}
        weights = tuple(slot_of[layers.program.weights[x]] for x in part.shape.weights)
        new = {
            p: x
            for p, x in stage.outputs.items()
            if p in cache and isinstance(x, int) and x in made
        }
        found.add((weights, frozenset((slot_of[cache[p]], made[x]) for p, x in new.items())))
    return found.pop()[0] if len(found) == 1 else None
