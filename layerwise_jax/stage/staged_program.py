"""What a pipeline's tick loops are made of: the program cut, aligned, wired and placed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax.numpy as jnp

from layerwise_jax.schedule.generators import forward_only
from layerwise_jax.stage.align import Alignment
from layerwise_jax.stage.cut import Stage
from layerwise_jax.stage.placement import Placement
from layerwise_jax.stage.wiring import Wiring
from layerwise_jax.trace.program import Program, Weight


@dataclass(frozen=True, eq=False)
class StagedProgram:
    """What the tick loops are made of.

    Attributes:
      program: the flat program of one microbatch.
      stages, alignment, wiring, placement: the program cut, split, wired and placed.
      num_devices: devices that a replica's stages go round; stage s lives on device s %
        num_devices.
      num_microbatches: microbatches on each replica.
      in_axes: for every input leaf, 0 if microbatches split it, None if each gets it whole.
      state: for outputs that are new values of weights, which weight.
      frozen: the weights that are not trained.
      bubble_fill: what bubbles compute on; 0, or NaN to prove that nothing leaks out of them.
      body_slots: the slots of the common body's weights where the placement was made for another
        program; else they stand first, those of the first chunk before those of the second.
    """

    program: Program
    stages: tuple[Stage, ...]
    alignment: Alignment
    wiring: Wiring
    placement: Placement
    num_devices: int
    num_microbatches: int
    in_axes: tuple[int | None, ...]
    state: Mapping[int, Weight]
    frozen: frozenset[Weight] = frozenset()
    bubble_fill: float = 0.0
    body_slots: tuple[int, ...] | None = None

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    @property
    def num_chunks(self) -> int:
        """Stages that a device has. The stages 0..num_devices-1 are chunk 0, the next ones chunk
        1.
        """
        return self.num_stages // self.num_devices

    @property
    def num_ticks(self) -> int:
        """Ticks of the forward loop: num_chunks rounds of every microbatch, and the filling of the
        pipeline.
        """
        if self.num_chunks > 1:
            return forward_only(self.num_devices, self.num_microbatches, self.num_chunks).num_ticks
        return self.num_microbatches + self.num_stages - 1 + self.wiring.lag

    @property
    def has_body(self) -> bool:
        """Whether stages have a body in common of which anything is used."""
        return bool(self.wiring.body_results)

    @property
    def num_body_weights(self) -> int:
        """The common body has as many weights."""
        return len(self.alignment.parts[0].shape.weights)

    @cached_property
    def state_slots(self) -> tuple[int, ...]:
        """The slots that hold state."""
        weights = set(self.state.values())
        return tuple(
            j for j, slot in enumerate(self.placement.slots) if weights.intersection(slot.weights)
        )

    def has_gradient(self, slot: int) -> bool:
        """Whether any weight of a slot is trained: state, integers and what is frozen have no
        gradient.
        """
        held = self.placement.slots[slot]
        trained = any(weight is not None and weight not in self.frozen for weight in held.weights)
        return (
            trained
            and slot not in self.state_slots
            and jnp.issubdtype(held.aval.dtype, jnp.inexact)
        )

    def output_aval(self, position: int) -> Any:
        """The type of an output of one microbatch."""
        return self.program.aval(self.program.outputs[position])
