"""The staged program: a function cut, aligned, wired and placed, as the tick loops take it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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
    """A function in stages: input of the tick loops.

    Attributes:
      program: the flat program of one microbatch.
      stages, alignment, wiring, placement: the program cut, split, wired and placed.
      num_devices: pipeline devices per replica; stages are assigned round-robin.
      num_microbatches: microbatches on each replica.
      in_axes: for every input leaf, 0 if microbatches split it, None if each reads it whole.
      state: output position -> the weight of carried state: see `State`.
      renewed: output position -> the leaf of renewed state.
      frozen: the weights that are not trained.
      bubble_fill: fill value for bubble inputs: 0, or NaN to prove that nothing leaks from bubbles.
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
    renewed: Mapping[int, int] = field(default_factory=dict)

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    @property
    def num_chunks(self) -> int:
        """Stages per device: stages 0..num_devices-1 are chunk 0, the next ones chunk 1."""
        return self.num_stages // self.num_devices

    @property
    def num_ticks(self) -> int:
        """Ticks of the forward loop.

        With one stage a device: num_microbatches + num_stages - 1, one more if outputs lag.
        """
        if self.num_chunks > 1:
            return forward_only(self.num_devices, self.num_microbatches, self.num_chunks).num_ticks
        return self.num_microbatches + self.num_stages - 1 + self.wiring.lag

    @property
    def has_body(self) -> bool:
        """True if the stages have a common body and a result of it is used."""
        return bool(self.wiring.body_results)

    @cached_property
    def state_slots(self) -> tuple[int, ...]:
        """The slots that hold state."""
        weights = set(self.state.values())  # state shares slots with state only: see slots.py
        return tuple(
            j for j, slot in enumerate(self.placement.slots) if weights.intersection(slot.weights)
        )

    @property
    def has_state(self) -> bool:
        """True if a call returns new state."""
        return bool(self.state or self.renewed)

    def is_state(self, weight: Weight | None) -> bool:
        """True if a call gives this weight a new value."""
        if weight is None:  # padding
            return False
        return weight in self.state.values() or weight.leaf in self.renewed.values()

    def has_gradient(self, slot: int) -> bool:
        """True if a weight of the slot is trained: floating-point, neither state nor frozen."""
        held = self.placement.slots[slot]
        trained = any(weight is not None and weight not in self.frozen for weight in held.weights)
        return (
            trained
            and slot not in self.state_slots
            and jnp.issubdtype(held.aval.dtype, jnp.inexact)
        )

    @property
    def inputs_avals(self) -> tuple[Any, ...]:
        """Types of the inputs of one microbatch, those that are computed beforehand included."""
        return tuple(self.program.avals[x] for x in self.program.inputs)

    def output_aval(self, position: int) -> Any:
        """The type of an output of one microbatch."""
        return self.program.aval(self.program.outputs[position])
