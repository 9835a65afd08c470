"""How outputs leave the loop: put together from those of the microbatches, once, by collectives
after it.
"""

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
from layerwise_jax.run.stage import MicrobatchContext
from layerwise_jax.run.wire import sum_dtype, to_wire, wire_aval
from layerwise_jax.stage.staged_program import StagedProgram


def start_output(loop: StagedProgram, position: int, role: str) -> Any:
    """An output before the first microbatch: "rows" for all of them, "reduced" and "whole" for
    one.
    """
    aval = wire_aval(loop.output_aval(position))
    if role == "rows":
        return jnp.zeros((loop.num_microbatches, *aval.shape), aval.dtype)
    return jnp.zeros(aval.shape, sum_dtype(aval.dtype) if role == "reduced" else aval.dtype)


def add_output(role: str, so_far: Any, made: Any, moment: MicrobatchContext, is_mine: Any) -> Any:
    """An output with what this microbatch made of it, where this device is the one that makes
    it.
    """
    is_mine, made = moment.is_active & is_mine, to_wire(made)
    if role == "rows":
        row = jnp.where(is_mine, made, so_far[moment.index])
        return lax.dynamic_update_index_in_dim(so_far, row, moment.index, 0)
    if role == "reduced":
        return so_far + jnp.where(is_mine, made, jnp.zeros_like(made)).astype(so_far.dtype)
    return jnp.where(is_mine & (moment.index == 0), made, so_far)


@dataclass(frozen=True, eq=False)
class Outputs:
    """The outputs of a function, each with its role.

    Attributes:
      loop: the pipeline.
      combining: for every output, how it follows from those of the parts.
      avals: the type of every output in one part.
      mesh: the mesh, with an axis `stage`; replicas are over an axis `data`.
    """

    loop: StagedProgram
    combining: tuple[OutputRole, ...]
    avals: tuple[Any, ...]
    mesh: Mesh

    @property
    def roles(self) -> tuple[str, ...]:
        """For every output, what the loop does with it: "rows" keeps that of every microbatch."""
        return tuple("rows" if x.kind == "extreme" else x.kind for x in self.combining)

    @property
    def parts(self) -> int:
        """Parts that the batch is split into: microbatches of all replicas."""
        return self.loop.num_microbatches * self.mesh.shape.get(DATA, 1)

    def specs(self) -> list[PartitionSpec]:
        """How the outputs lie on the mesh."""
        return [
            self._spec(role, aval) for role, aval in zip(self.combining, self.avals, strict=True)
        ]

    def of_rows(self, outputs: Sequence[Any]) -> list[Any]:
        """On a device: the outputs of the batch, from those of all microbatches (zeros where they
        are not made).
        """
        return [
            self._of_batch(*each) for each in zip(outputs, self.combining, self.avals, strict=True)
        ]

    def of_batch(self, outputs: Sequence[Any]) -> list[Any]:
        """On a device: the same from what was added up in the loop, but for rows."""
        return self.of_rows(
            [x if role == "rows" else x[None] for x, role in zip(outputs, self.roles, strict=True)]
        )

    def _of_batch(self, rows: Any, role: OutputRole, aval: Any) -> Any:
        if role.kind == "rows":
            rows = rows.reshape(-1, *rows.shape[2:])
            result = self._spread(rows) if self._is_spread(rows.shape[0]) else _everywhere(rows)
        elif role.kind == "reduced":
            result = self._reduce(rows, role, aval)
        elif role.kind == "extreme":
            result = self._extreme(rows, role)
        else:
            result = _everywhere(rows[0])
        return wrap_key(result, aval) if is_key(aval) else result

    def _extreme(self, rows: Any, role: OutputRole) -> Any:
        """The largest or smallest over [microbatches, ...] and the replicas."""
        rows = _everywhere(rows)
        if DATA in self.mesh.axis_names:
            rows = lax.all_gather(rows, DATA, tiled=True)  # unlike pmax, has a derivative
        return jnp.max(rows, axis=0) if role.combine == "max" else jnp.min(rows, axis=0)

    def _reduce(self, rows: Any, role: OutputRole, aval: Any) -> Any:
        over = (STAGE, DATA) if DATA in self.mesh.axis_names else STAGE
        total = lax.psum(jnp.sum(rows, axis=0, dtype=sum_dtype(rows.dtype)), over)
        return (total / self.parts if role.combine == "mean" else total).astype(aval.dtype)

    def _is_spread(self, num_rows: int) -> bool:
        return num_rows % self.loop.num_devices == 0

    def _spread(self, rows: Any) -> Any:
        """A share of the rows on every stage: nothing is gathered that no one asked for."""
        summed = lax.psum_scatter(_addable(rows), STAGE, scatter_dimension=0, tiled=True)
        return summed.astype(rows.dtype)

    def _spec(self, role: OutputRole, aval: Any) -> PartitionSpec:
        if role.kind != "rows":
            return PartitionSpec()
        axes = [DATA] if DATA in self.mesh.axis_names else []
        axes += [STAGE] if self._is_spread(aval.shape[0] * self.loop.num_microbatches) else []
        return PartitionSpec(tuple(axes)) if axes else PartitionSpec()


def _everywhere(rows: Any) -> Any:
    return lax.psum(_addable(rows), STAGE).astype(rows.dtype)


def _addable(x: Any) -> Any:
    return x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
