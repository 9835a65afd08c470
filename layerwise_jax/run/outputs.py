"""Outputs of the function: added up in the tick loop, combined by collectives once after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from layerwise_jax._jax import is_key, wrap_key
from layerwise_jax.batch.outputs import OutputRole
from layerwise_jax.mesh import DATA, STAGE
from layerwise_jax.run.microbatch import MicrobatchContext
from layerwise_jax.run.wire import sum_dtype, to_wire, wire_aval
from layerwise_jax.stage.staged_program import StagedProgram


def start_output(program: StagedProgram, position: int, role: str) -> Any:
    """Zeros for an output: [microbatches, rows, ...] for role "rows", else of one microbatch."""
    aval = wire_aval(program.output_aval(position))
    if role == "rows":
        return jnp.zeros((program.num_microbatches, *aval.shape), aval.dtype)
    return jnp.zeros(aval.shape, sum_dtype(aval.dtype) if role == "reduced" else aval.dtype)


def add_output(role: str, so_far: Any, made: Any, context: MicrobatchContext, is_mine: Any) -> Any:
    """An output with the result of one microbatch added.

    Args:
      role: "rows": stacked; "reduced": summed; "whole": that of microbatch 0.
      so_far: the output, as `start_output` and this function return it.
      made: the result of this microbatch.
      context: the microbatch; nothing is added in a bubble.
      is_mine: bool scalar, True on the device whose stage makes the output.
    """
    is_mine = context.is_active & is_mine  # a bubble's result may be NaN: where, not a product
    made = to_wire(made)
    if role == "rows":
        # [rows, ...]; a device that makes nothing writes what was there
        row = jnp.where(is_mine, made, so_far[context.index])
        return lax.dynamic_update_index_in_dim(so_far, row, context.index, 0)
    if role == "reduced":
        return so_far + jnp.where(is_mine, made, jnp.zeros_like(made)).astype(so_far.dtype)
    return jnp.where(is_mine & (context.index == 0), made, so_far)


@dataclass(frozen=True, eq=False)
class Outputs:
    """The outputs of a function, each with its role.

    Attributes:
      loop: the staged program.
      combining: for every output, how microbatches combine.
      avals: the type of every output of one microbatch.
      mesh: the mesh, with an axis `stage`; replicas are over an axis `data`.
    """

    loop: StagedProgram
    combining: tuple[OutputRole, ...]
    avals: tuple[Any, ...]
    mesh: Mesh

    @property
    def roles(self) -> tuple[str, ...]:
        """For every output, the role in the loop: "rows" keeps that of every microbatch."""
        return tuple("rows" if x.kind == "extreme" else x.kind for x in self.combining)

    @property
    def parts(self) -> int:
        """Parts that the batch is split into: microbatches of all replicas."""
        return self.loop.num_microbatches * self.mesh.shape.get(DATA, 1)

    def specs(self) -> list[PartitionSpec]:
        """The sharding of every output."""
        return [self._spec(*each) for each in zip(self.combining, self.avals, strict=True)]

    def combine(self, outputs: Sequence[Any]) -> list[Any]:
        """On a device: the outputs of the batch, from those that `add_output` added up.

        Every output is zero on all stages but the one that makes it, so a sum over `stage` is a
        copy of it to all stages.
        """
        together = zip(outputs, self.combining, self.avals, strict=True)
        return [self._combine(*each) for each in together]

    def _combine(self, output: Any, role: OutputRole, aval: Any) -> Any:
        # output: [microbatches, rows, ...] for rows, [microbatches, ...] for an extreme, else [...]
        if role.kind == "rows":
            rows = output.reshape(-1, *output.shape[2:])  # [rows of all microbatches, ...]
            result = self._scatter(rows) if self._is_scattered(rows.shape[0]) else _replicate(rows)
        elif role.kind == "reduced":
            result = self._reduce(output, role, aval)
        elif role.kind == "extreme":
            result = self._extreme(output, role)
        else:
            result = _replicate(output)
        return wrap_key(result, aval) if is_key(aval) else result

    def _extreme(self, output: Any, role: OutputRole) -> Any:
        """The largest or smallest over [microbatches, ...] and the replicas."""
        each = _replicate(output)
        if DATA in self.mesh.axis_names:
            each = lax.all_gather(each, DATA, tiled=True)  # unlike pmax, has a derivative
        return jnp.max(each, axis=0) if role.combine == "max" else jnp.min(each, axis=0)

    def _reduce(self, output: Any, role: OutputRole, aval: Any) -> Any:
        over = (STAGE, DATA) if DATA in self.mesh.axis_names else STAGE
        total = lax.psum(output, over)
        return (total / self.parts if role.combine == "mean" else total).astype(aval.dtype)

    def _is_scattered(self, num_rows: int) -> bool:
        return num_rows % self.loop.num_devices == 0

    def _scatter(self, rows: Any) -> Any:
        """Give each stage an equal share of the rows; no device gathers all of them."""
        # zeros from all stages but one: the sum is that stage's rows
        summed = lax.psum_scatter(_addable(rows), STAGE, scatter_dimension=0, tiled=True)
        return summed.astype(rows.dtype)

    def _spec(self, role: OutputRole, aval: Any) -> PartitionSpec:
        if role.kind != "rows":
            return PartitionSpec()
        axes = [DATA] if DATA in self.mesh.axis_names else []
        num_rows = aval.shape[0] * self.loop.num_microbatches
        axes += [STAGE] if self._is_scattered(num_rows) else []
        return PartitionSpec(tuple(axes)) if axes else PartitionSpec()


def _replicate(rows: Any) -> Any:
    return lax.psum(_addable(rows), STAGE).astype(rows.dtype)


def _addable(x: Any) -> Any:
    """Booleans as uint8: collectives do not add booleans."""
    return x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
