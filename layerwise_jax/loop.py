"""The forward tick loop of a pipeline, as it runs on one device inside `shard_map`.

In tick t stage s works on microbatch t - s: it runs its branch (if stages differ), the common body, and sends what the
next stage needs. Bubbles (ticks in which a stage has no microbatch) compute on zeros, and what they make is replaced by
zeros before anything uses it, gradients included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax.numpy as jnp
from jax import lax

from layerwise_jax._jax import Literal
from layerwise_jax.alignment import Alignment
from layerwise_jax.on_device import Moment, StageOnDevice, fill, to_wire, wire_aval
from layerwise_jax.placement import STAGE, Placement
from layerwise_jax.program import Program, Weight
from layerwise_jax.stages import Stage
from layerwise_jax.wiring import Output, Wiring


@dataclass(frozen=True, eq=False)
class Loop:
    """What the tick loop is made of.

    Attributes:
      program: the flat program of one microbatch.
      stages, alignment, wiring, placement: the program cut, split, wired and placed.
      num_microbatches: microbatches on each replica.
      in_axes: for every input leaf, 0 if microbatches split it, None if each gets it whole.
      state: for outputs that are new values of weights, which weight.
      bubble_fill: what bubbles compute on; 0, or NaN to prove that nothing leaks out of them.
    """

    program: Program
    stages: tuple[Stage, ...]
    alignment: Alignment
    wiring: Wiring
    placement: Placement
    num_microbatches: int
    in_axes: tuple[int | None, ...]
    state: Mapping[int, Weight]
    bubble_fill: float = 0.0

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    @property
    def num_ticks(self) -> int:
        return self.num_microbatches + self.num_stages - 1 + self.wiring.lag

    @property
    def has_body(self) -> bool:
        """Whether stages have a body in common of which anything is used."""
        return bool(self.wiring.body_results)

    @property
    def num_body_weights(self) -> int:
        """The common body's weights stand in as many slots, the first ones."""
        return len(self.alignment.parts[0].shape.weights)

    @cached_property
    def state_slots(self) -> tuple[int, ...]:
        """The slots that hold state."""
        weights = set(self.state.values())
        return tuple(j for j, slot in enumerate(self.placement.slots) if weights.intersection(slot.weights))

    def output_aval(self, position: int) -> Any:
        """The type of an output of one microbatch."""
        operand = self.program.outputs[position]
        return operand.aval if isinstance(operand, Literal) else self.program.avals[operand]

    def run(self, weights: Sequence[Any], inputs: Sequence[Any], replica: Any) -> tuple[list[Any], list[Any]]:
        """All ticks on this device.

        Args:
          weights: this stage's row of every slot, in the weight's own shape.
          inputs: every input leaf: (microbatches, ...) where it is split, whole otherwise.
          replica: this device's index on the data axis.

        Returns:
          Every output, stacked over microbatches and zero except on the stage that makes it; the slots afterwards,
          which differ from `weights` in what is state.
        """
        device = StageOnDevice(self, list(inputs), lax.axis_index(STAGE), replica)
        arrived = [fill(wire_aval(lane.aval), self.bubble_fill) for lane in self.wiring.lanes]
        kept = [fill(wire_aval(self.program.avals[x]), self.bubble_fill) for x, _ in self.wiring.kept]
        ticks = jnp.arange(self.num_ticks, dtype=jnp.int32)
        (_, _, slots), rows = lax.scan(partial(self._tick, device), (arrived, kept, list(weights)), ticks)
        outputs = zip(self.wiring.outputs, rows, strict=True)
        return [self._collect(output, row, device.stage) for output, row in outputs], slots

    def _tick(
        self, device: StageOnDevice, carry: tuple[list[Any], list[Any], list[Any]], t: Any
    ) -> tuple[tuple[list[Any], list[Any], list[Any]], list[Any]]:
        arrived, kept, slots = carry
        now, before = Moment(device, t - device.stage), Moment(device, t - device.stage - 1)
        results = device.run_stage(now, arrived, slots, late=(before, kept))
        sent = [device.send(results.made(lane.source), lane.pairs, now) for lane in self.wiring.lanes]
        kept = [to_wire(results.made(source)) for _, source in self.wiring.kept]
        return (sent, kept, results.slots), [to_wire(results.made(output.source)) for output in self.wiring.outputs]

    def _collect(self, output: Output, rows: Any, stage: Any) -> Any:
        """The ticks in which an output appears, zero on the stages that do not make it."""
        start = output.stage + output.lag
        made = lax.slice_in_dim(rows, start, start + self.num_microbatches)
        return made if self.num_stages == 1 else jnp.where(stage == output.stage, made, jnp.zeros_like(made))
