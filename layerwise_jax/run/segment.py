"""Operations of one stage outside of the common body, and their VJP."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from layerwise_jax.run.stage import LocalStage, MicrobatchContext
from layerwise_jax.trace.derivative import is_inexact
from layerwise_jax.trace.program import Op, Operand, Value


@dataclass(frozen=True, eq=False)
class StageSegment:
    """Operations of one stage under the branch.

    Attributes:
      device: a device with the stage's chunk.
      stage: the stage.
      ops: the operations.
      wanted: their results that anything uses.
    """

    device: LocalStage
    stage: int
    ops: Sequence[Op]
    wanted: Sequence[Operand]

    def weights(self, slots: Sequence[Any]) -> dict[Value, Any]:
        """The weights that it uses, but for state."""
        return {
            x: slots[j] for x, j in self.slots().items() if j not in self.device.loop.state_slots
        }

    def state(self, slots: Sequence[Any]) -> dict[Value, Any]:
        """The state that it uses."""
        return {x: slots[j] for x, j in self.slots().items() if j in self.device.loop.state_slots}

    def slots(self) -> dict[Value, int]:
        """The slot of every weight that it uses."""
        used = {x for op in self.ops for x in op.values} | {
            x for x in self.wanted if isinstance(x, int)
        }
        slot_of = self.device.loop.placement.slot_of(self.stage)
        return {
            x: slot_of[weight]
            for x, weight in self.device.loop.stages[self.stage].weights.items()
            if x in used
        }

    def trained(self) -> dict[Value, int]:
        """The slot of every weight that has a gradient."""
        return {x: j for x, j in self.slots().items() if self.device.loop.has_gradient(j)}

    def linearize(
        self, moment: MicrobatchContext, weights: Mapping[Value, Any], reads: Mapping[Value, Any]
    ) -> tuple[list[Any], Callable]:
        """Its results, and the vjp with respect to trained weights and inexact reads, by value."""
        known = {**self.device.given(moment, self.stage), **weights, **reads}
        state = self.state(range(len(self.device.loop.placement.slots)))
        moving = {x: known[x] for x in self.trained()}
        moving |= {x: v for x, v in reads.items() if is_inexact(v) and x not in state}
        run = self.device.evaluate
        return jax.vjp(
            lambda moving: run(self.ops, {**known, **moving}, self.wanted, moment), moving
        )


def segment_before_body(device: LocalStage, s: int) -> tuple[StageSegment, list[int]]:
    """What stage s runs before its body, and which results of the branch that gives."""
    part = device.loop.alignment.parts[s]
    late = {x for op in part.after for x in op.results}
    values = [row[s] for _, row in device.wiring.branch_results]
    asked = [r for r, x in enumerate(values) if x is not None and x not in late]
    return StageSegment(device, s, part.before, [values[r] for r in asked]), asked  # type: ignore[misc]


def segment_after_body(device: LocalStage) -> tuple[StageSegment, list[int]]:
    """What the last stage runs after its body, and the positions of the outputs that gives."""
    last = device.loop.num_stages - 1
    positions = [p for p, output in enumerate(device.wiring.outputs) if output.lag]
    wanted = [device.loop.stages[last].outputs[p] for p in positions]
    return StageSegment(device, last, device.loop.alignment.parts[last].after, wanted), positions
