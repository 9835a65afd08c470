"""Once-a-step programs of a column: the prelude before its stages, the prelude's vjp after them.

The vjp turns the accumulated cotangents of prepared values into gradients of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from layerwise_jax.host.stage_program import StageProgram
from layerwise_jax.mesh import DATA
from layerwise_jax.run.wire import sum_dtype
from layerwise_jax.trace.program import Op, Program, Value, Weight, evaluate


@dataclass(frozen=True, eq=False)
class ColumnProgram:
    """The prelude of all stages of a column, and its vjp.

    Attributes:
      program: the program.
      ops: the column's operations on weights and constants only, in the order of the trace.
      prepared: all that its stages read of weights, constants and prelude.
      trained: those that have an accumulator.
      trained_weights: the weights that have a gradient.
      replicas: devices on the mesh axis `data`.
    """

    program: Program
    ops: tuple[Op, ...]
    prepared: tuple[Value, ...]
    trained: tuple[Value, ...]
    trained_weights: frozenset[Weight]
    replicas: int

    @cached_property
    def made(self) -> tuple[Value, ...]:
        """Prepared values that the prelude computes; stages read weights and constants directly."""
        return tuple(
            x
            for x in self.prepared
            if x not in self.program.weights and x not in self.program.constants
        )

    @cached_property
    def constants(self) -> tuple[Value, ...]:
        """The constants that stages or prelude read."""
        read = {*self.prepared, *(x for op in self.ops for x in op.values)}
        return tuple(x for x in self.program.constants if x in read)

    @cached_property
    def weights(self) -> tuple[Value, ...]:
        """The weights that the prelude reads, or whose gradient passes through an accumulator."""
        # A trained weight that no prelude op reads has its accumulator only.
        read = {*self.trained, *(x for op in self.ops for x in op.values)}
        return tuple(x for x in self.program.weights if x in read)

    @cached_property
    def moving(self) -> tuple[Value, ...]:
        """The trained weights that get a gradient from the accumulators."""
        # Backwards through the prelude: from accumulators to the weights behind them.
        reached = set(self.trained)
        for op in reversed(self.ops):
            if not reached.isdisjoint(op.results):
                reached.update(op.values)
        return tuple(
            x
            for x in self.weights
            if x in reached and self.program.weights[x] in self.trained_weights
        )

    def accumulator_aval(self, value: Value) -> jax.ShapeDtypeStruct:
        """The type of a prepared value's accumulator: one shard for each replica."""
        aval = self.program.avals[value]
        return jax.ShapeDtypeStruct((self.replicas, *aval.shape), sum_dtype(aval.dtype))

    def prepare(self, weights: Sequence[Any], constants: Sequence[Any]) -> list[Any]:
        """`made`, from `weights` and `constants`; all are [1, *shape]."""
        known = self._known([_local(x) for x in weights], [_local(x) for x in constants])
        return [_held(x) for x in evaluate(self.ops, known, self.made)]

    def finish(
        self, accumulators: Sequence[Any], weights: Sequence[Any], constants: Sequence[Any]
    ) -> list[Any]:
        """Gradients of `moving`, [1, *shape] in `sum_dtype`: accumulators summed over replicas,
        then one vjp of the prelude.

        A cast at the end of the prelude is skipped: the float32 accumulator of a bfloat16 copy is
          the gradient of the
        float32 weight, which the cast's transpose would round.
        """
        sums = [_local(x) for x in accumulators]
        if self.replicas > 1:
            # One all-reduce a step, not one a microbatch.
            sums = [lax.psum(x, DATA) for x in sums]
        by_root: dict[Value, Any] = {}
        for x, total in zip(self.trained, sums, strict=True):
            root = self.roots[x]
            # Casts of one weight to two dtypes have one root.
            by_root[root] = by_root[root] + total if root in by_root else total
        gradients: dict[Value, Any] = {x: by_root[x] for x in self.moving if x in by_root}
        # Values that the prelude computes (a transpose): their cotangents need its vjp.
        behind = [x for x in by_root if x not in self.program.weights]
        if behind:
            local = [_local(x) for x in weights]
            known = self._known(local, [_local(x) for x in constants])
            moving = {x: known[x] for x in self.moving}
            _, vjp_fn = jax.vjp(
                lambda moving: evaluate(self.ops, {**known, **moving}, behind), moving
            )
            (pulled,) = vjp_fn([by_root[x].astype(self.program.avals[x].dtype) for x in behind])
            for x, gradient in pulled.items():
                # A weight may be read directly and through the prelude: add in float32.
                wide = gradient.astype(sum_dtype(gradient.dtype))
                gradients[x] = gradients[x] + wide if x in gradients else wide
        return [_held(gradients[x]) for x in self.moving]

    def _known(self, weights: Sequence[Any], constants: Sequence[Any]) -> dict[Value, Any]:
        return dict(zip(self.weights, weights, strict=True)) | dict(
            zip(self.constants, constants, strict=True)
        )

    @cached_property
    def roots(self) -> dict[Value, Value]:
        """For every trained value, the value whose gradient its accumulator is: that before a
        cast.
        """
        made_by = {x: op for op in self.ops for x in op.results}
        return {x: self._root(x, made_by) for x in self.trained}

    def _root(self, value: Value, made_by: dict[Value, Op]) -> Value:
        # None for a weight or constant, which is its own root.
        op = made_by.get(value)
        if op is None or op.name != "convert_element_type" or not op.values:
            return value
        source = op.values[0]
        wide, narrow = self.program.avals[source].dtype, self.program.avals[value].dtype
        is_cast = jnp.issubdtype(wide, jnp.floating) and jnp.issubdtype(narrow, jnp.floating)
        # An accumulator is as wide as the source, or the sum would be rounded here.
        fits = is_cast and jnp.promote_types(sum_dtype(narrow), wide) == sum_dtype(narrow)
        return self._root(source, made_by) if fits else value


def column_programs(
    program: Program,
    stages: Sequence[StageProgram],
    prelude: Sequence[Op],
    trained_weights: frozenset[Weight],
    num_columns: int,
    replicas: int,
) -> tuple[ColumnProgram, ...]:
    """The prelude of every column, as far as its stages need it."""
    programs = []
    for column in range(num_columns):
        own = [stage for stage in stages if stage.device == column]
        prepared = tuple(dict.fromkeys(x for stage in own for x in stage.prepared))
        trained = tuple(dict.fromkeys(x for stage in own for x in stage.trained))
        needed = set(prepared)
        ops = []
        # Dead code elimination: keep what this column's stages need.
        for op in reversed(prelude):
            if not needed.isdisjoint(op.results):
                ops.append(op)
                needed.update(op.values)
        programs.append(
            ColumnProgram(
                program, tuple(reversed(ops)), prepared, trained, trained_weights, replicas
            )
        )
    return tuple(programs)


def _local(x: Any) -> Any:
    """A device's shard [1, *shape] as the value."""
    return lax.squeeze(x, (0,))


def _held(x: Any) -> Any:
    """A value as a shard [1, *shape]."""
    return lax.expand_dims(jnp.asarray(x), (0,))
