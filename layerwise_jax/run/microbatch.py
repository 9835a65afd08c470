"""One microbatch on one device: inputs, slice of the batch, and gradients in bubbles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from layerwise_jax.stage.staged_program import StagedProgram
from layerwise_jax.trace.derivative import is_inexact
from layerwise_jax.trace.program import BatchSlice, Value


class ReplicaInputs(Protocol):
    """The inputs of a replica, as a `LocalStage` has them.

    Attributes:
      loop: the staged program.
      inputs: every input leaf: [microbatches, rows, ...] where it is split, else whole.
      replica: int32 scalar, the replica's index on the data axis.
      gates: True if JAX differentiates the loop, so that gradients must be kept out of bubbles.
    """

    loop: StagedProgram
    inputs: list[Any]
    replica: Any
    gates: bool


class MicrobatchContext:
    """A microbatch that a device works on.

    Attributes:
      is_active: bool scalar, False in a bubble: the microbatch is outside of 0..M-1.
      index: int32 scalar, the microbatch, clipped to 0..M-1.
      rows: the slice of the full batch that the microbatch is.
    """

    def __init__(self, device: ReplicaInputs, microbatch: Any):
        count = device.loop.num_microbatches
        self.device = device
        self.is_active = (microbatch >= 0) & (microbatch < count)
        self.index = jnp.clip(microbatch, 0, count - 1)
        # replicas split the batch first, then microbatches
        self.rows = BatchSlice(device.replica * count + self.index)

    def input(self, j: int) -> Any:
        """Input leaf j of this microbatch."""
        array = self.device.inputs[j]  # [microbatches, rows, ...] if split
        if self.device.loop.in_axes[j] is None:
            return array
        return lax.dynamic_index_in_dim(array, self.index, 0, keepdims=False)

    def gate(self, values: Mapping[Value, Any]) -> dict[Value, Any]:
        """The same values, with zero gradients in bubbles whatever their cotangents are.

        A `where` on results would not do: its transpose multiplies a bubble's NaN by zero.
        """
        if not self.device.gates:
            return dict(values)
        inexact = {x: v for x, v in values.items() if is_inexact(v)}
        return {**values, **_gate(self.is_active, inexact)}


@dataclass(frozen=True)
class LateAfter:
    """Inputs of the last stage's `after`, if it runs one tick behind its body.

    Attributes:
      context: the microbatch of the tick before.
      kept: the values that `after` reads, in wire format, in the order of `Wiring.kept`.
    """

    context: MicrobatchContext
    kept: Sequence[Any]


@jax.custom_jvp
def _gate(is_active: Any, values: dict[Value, Any]) -> dict[Value, Any]:
    del is_active
    return values


@_gate.defjvp
def _gate_jvp(primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    is_active, values = primals
    return values, jax.tree.map(lambda x: jnp.where(is_active, x, jnp.zeros_like(x)), tangents[1])
