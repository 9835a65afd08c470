"""Programs that a column runs once a step: prelude, zeros, gradients, outputs. Called by the
caller's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from layerwise_jax.batch.outputs import OutputRole
from layerwise_jax.host.column_programs import ColumnProgram
from layerwise_jax.mesh import DATA, STAGE
from layerwise_jax.run.outputs import Outputs
from layerwise_jax.run.wire import sum_dtype
from layerwise_jax.trace.program import Value, Weight

ON_STAGE = PartitionSpec(STAGE)
EVERYWHERE = PartitionSpec()


@dataclass(frozen=True, eq=False)
class ColumnCalls:
    """The once-a-step programs of a column, jitted on its sub-mesh.

    Attributes:
      program: prelude and its vjp.
      mesh: the sub-mesh.
      outputs: how the function's outputs combine over microbatches.
      made: the positions of the outputs that the column makes, new state left out.
      tied: the weights that other columns have too; their gradients are summed before they are
        cast.
      options: XLA options.
    """

    program: ColumnProgram
    mesh: Mesh
    outputs: Outputs
    made: tuple[int, ...]
    tied: frozenset[Weight]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def per_replica(self) -> PartitionSpec:
        return PartitionSpec(DATA) if DATA in self.mesh.axis_names else EVERYWHERE

    @cached_property
    def constants(self) -> tuple[Any, ...]:
        """The constants that the column reads, [1, *shape] on its devices."""
        held = (
            # [1, *shape]: the form of a slot's shard, as the weights have it.
            jnp.asarray(self.program.program.constants[x])[None]
            for x in self.program.constants
        )
        return tuple(jax.device_put(x, NamedSharding(self.mesh, ON_STAGE)) for x in held)

    def prepare(self, weights: Mapping[Weight, Any]) -> dict[Value, Any]:
        """Every prepared value: weights and constants as they are, the others from the prelude."""
        by_value = self.program.program.weights
        prepared = {x: weights[by_value[x]] for x in self.program.prepared if x in by_value}
        prepared |= dict(zip(self.program.constants, self.constants, strict=True))
        if self.program.made:
            made = self._prepare(
                tuple(weights[by_value[x]] for x in self.program.weights), self.constants
            )
            # Same order as `ColumnProgram.prepare` returns them.
            prepared |= dict(zip(self.program.made, made, strict=True))
        return prepared

    def zeros(self) -> tuple[dict[Value, Any], dict[int, Any]]:
        """Accumulators by prepared value, output sums by position, all zero."""
        accumulators, sums = self._zeros()
        return dict(zip(self.program.trained, accumulators, strict=True)), dict(
            zip(self.summed, sums, strict=True)
        )

    def output_zeros(self) -> dict[int, Any]:
        """Output sums by position, all zero, for calls without gradients."""
        return dict(zip(self.summed, self._output_zeros(), strict=True))

    def finish(
        self, accumulators: dict[Value, Any], weights: Mapping[Weight, Any]
    ) -> dict[Weight, Any]:
        """Gradients [1, *shape] of the column's weights; of tied ones the column's share, in
        `sum_dtype`.
        """
        program = self.program
        reads = tuple(weights[program.program.weights[x]] for x in program.weights)
        # Popped: a donated array must not be reachable any more.
        given = {x: accumulators.pop(x) for x in program.trained}
        # Two tuples of one length, None where the other has the array: only the first is donated.
        reused = tuple(x if value in self._reused else None for value, x in given.items())
        others = tuple(None if value in self._reused else x for value, x in given.items())
        gradients = self._finish(reused, others, reads, self.constants)
        found: dict[Weight, Any] = {}
        for x, gradient in zip(program.moving, gradients, strict=True):
            found[program.program.weights[x]] = gradient
        return found

    def collect(
        self, sums: Mapping[int, Any], listed: Mapping[int, Sequence[Any]]
    ) -> dict[int, Any]:
        """The column's outputs for the whole batch, by position, on the column's devices."""
        if not self.made:
            return {}
        # [replicas, *shape] for a sum; one array a microbatch for a listed output.
        given = tuple(sums[p] if p in sums else tuple(listed[p]) for p in self.made)
        return dict(zip(self.made, self._collect(given), strict=True))

    @cached_property
    def summed(self) -> tuple[int, ...]:
        """The outputs that are added up over microbatches."""
        return tuple(p for p in self.made if self.outputs.roles[p] == "reduced")

    @cached_property
    def _reused(self) -> frozenset[Value]:
        """The trained values whose accumulators become gradients in place, so may be donated."""
        program = self.program
        roots = [program.roots[x] for x in program.trained]
        return frozenset(
            x
            for x, root in zip(program.trained, roots, strict=True)
            # A root with two accumulators is a sum of them: neither array has the result's place.
            if roots.count(root) == 1 and self._becomes_gradient(x, root)
        )

    def _becomes_gradient(self, value: Value, root: Value) -> bool:
        """True if an accumulator is a weight's whole gradient: same dtype, nothing left to add.

        Tied weights and replicas have other summands, on other columns or devices.
        """
        weight = self.program.program.weights.get(root)
        # Tied: columns add their shares in float32 first, so the dtypes differ.
        if weight is None or weight in self.tied or self.program.replicas > 1:
            return False
        return self._sum_aval(value).dtype == self.program.program.avals[root].dtype

    def _sum_aval(self, value: Value) -> jax.ShapeDtypeStruct:
        return self.program.accumulator_aval(value)

    @cached_property
    def _prepare(self) -> Callable[..., Any]:
        return self._jit(self.program.prepare, "lw_prelude", (ON_STAGE, ON_STAGE), ON_STAGE)

    @cached_property
    def _finish(self) -> Callable[..., Any]:
        program = self.program

        def finish(reused: Any, others: Any, weights: Any, constants: Any) -> list[Any]:
            accumulators = [a if b is None else b for a, b in zip(reused, others, strict=True)]
            gradients = program.finish(accumulators, weights, constants)
            return [
                self._final(x, gradient)
                for x, gradient in zip(program.moving, gradients, strict=True)
            ]

        specs = (self.per_replica, self.per_replica, ON_STAGE, ON_STAGE)
        return self._jit(finish, "lw_finish", specs, ON_STAGE, donated=(0,))

    def _final(self, value: Value, gradient: Any) -> Any:
        program = self.program.program
        return (
            gradient
            # Tied shares stay in `sum_dtype` until all columns' are added.
            if program.weights[value] in self.tied
            else gradient.astype(program.avals[value].dtype)
        )

    @cached_property
    def _zeros(self) -> Callable[[], Any]:
        avals = [self._sum_aval(x) for x in self.program.trained]
        return self._jit_zeros((avals, self._output_avals))

    @cached_property
    def _output_zeros(self) -> Callable[[], Any]:
        return self._jit_zeros(self._output_avals)

    @property
    def _output_avals(self) -> list[jax.ShapeDtypeStruct]:
        # [replicas, *shape], one shard a replica.
        avals = [self.outputs.avals[p] for p in self.summed]
        shape = (self.program.replicas,)
        return [jax.ShapeDtypeStruct((*shape, *a.shape), sum_dtype(a.dtype)) for a in avals]

    def _jit_zeros(self, avals: Any) -> Callable[[], Any]:
        sharding = NamedSharding(self.mesh, self.per_replica)

        def lw_zeros() -> Any:
            return jax.tree.map(lambda aval: jnp.zeros(aval.shape, aval.dtype), avals)

        return jax.jit(
            lw_zeros, out_shardings=sharding, compiler_options=dict(self.options) or None
        )

    @cached_property
    def _collect(self) -> Callable[..., Any]:
        specs = [
            self.per_replica if self.outputs.combining[p].kind == "rows" else EVERYWHERE
            for p in self.made
        ]
        return self._jit(self._collected, "lw_outputs", (self.per_replica,), specs)

    def _collected(self, given: Sequence[Any]) -> list[Any]:
        return [self._output(p, x) for p, x in zip(self.made, given, strict=True)]

    def _output(self, position: int, given: Any) -> Any:
        """An output of the batch: the sum or mean, the rows of all microbatches, or what is the
        same in all.
        """
        role, aval = self.outputs.combining[position], self.outputs.avals[position]
        if role.kind == "rows":
            # Microbatches in order: [microbatches * rows, ...] of this replica.
            return jnp.concatenate([lax.squeeze(x, (0,)) for x in given])
        if role.kind == "extreme":
            return self._extreme(jnp.concatenate(given), role)  # [microbatches, ...]
        if role.kind != "reduced":
            # The same in every microbatch: take the first.
            return lax.squeeze(given[0], (0,))
        total = lax.squeeze(given, (0,))
        if self.program.replicas > 1:
            total = lax.psum(total, DATA)
        # parts = microbatches * replicas, all of equal size.
        mean = total / self.outputs.parts if role.combine == "mean" else total
        return mean.astype(aval.dtype)

    def _extreme(self, rows: Any, role: OutputRole) -> Any:
        """The largest or smallest over [microbatches, ...] and the replicas."""
        if self.program.replicas > 1:
            # [microbatches * replicas, ...] on every replica.
            rows = lax.all_gather(rows, DATA, tiled=True)
        return jnp.max(rows, axis=0) if role.combine == "max" else jnp.min(rows, axis=0)

    def _jit(
        self,
        run: Callable[..., Any],
        name: str,
        in_specs: Any,
        out_specs: Any,
        donated: tuple[int, ...] = (),
    ) -> Callable[..., Any]:
        if self.program.replicas > 1:
            run = jax.shard_map(
                run, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
            )

        # A new function: its name is the program's, and methods cannot be renamed.
        def program(*arguments: Any) -> Any:
            return run(*arguments)

        program.__name__ = program.__qualname__ = name
        is_spec = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
        shardings = jax.tree.map(
            lambda spec: NamedSharding(self.mesh, spec), out_specs, is_leaf=is_spec
        )
        return jax.jit(
            program,
            donate_argnums=donated,
            out_shardings=shardings,
            compiler_options=dict(self.options) or None,
        )
