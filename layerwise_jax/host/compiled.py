"""Stage functions compiled for the sub-mesh of their column.

An array of one microbatch is [replicas, *shape], sharded over `data`; a prepared value is [1,
*shape], sharded over
`stage`, an axis of size 1. So a device holds one [1, *shape] shard of either, and programs squeeze
that axis. `data` is
manual: inside a program nothing crosses replicas.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from layerwise_jax.host.differentiate import StageArguments, StageFunctions
from layerwise_jax.mesh import DATA, STAGE
from layerwise_jax.run.wire import sum_dtype
from layerwise_jax.schedule.columns import StepKind
from layerwise_jax.trace.program import Weight

Arrays = tuple[Any, ...]
Roles = Sequence[str]


@dataclass(frozen=True, eq=False)
class StageCalls:
    """The programs of a stage: functions of arrays as its devices hold them.

    Attributes:
      functions: forward and backward of one microbatch.
      mesh: the sub-mesh of its column.
      in_axes: for every input leaf, 0 if microbatches split it, None if each gets it whole.
      num_microbatches: microbatches of a replica.
      roles: for every output of the program, how microbatches combine.
      renewed: the weights that the stage's new state replaces, in the order of `stage.new_state`.
    """

    functions: StageFunctions
    mesh: Mesh
    in_axes: Sequence[int | None]
    num_microbatches: int
    roles: Roles
    renewed: tuple[Weight, ...]

    @property
    def replicas(self) -> int:
        return self.mesh.shape.get(DATA, 1)

    @cached_property
    def summed(self) -> tuple[int, ...]:
        """The outputs that are added up over microbatches, by position."""
        return tuple(p for p in self.functions.stage.outputs if self.roles[p] == "reduced")

    @cached_property
    def listed(self) -> tuple[int, ...]:
        """The outputs that every microbatch returns: rows, and what is the same for all."""
        return tuple(p for p in self.functions.stage.outputs if self.roles[p] != "reduced")

    def forward(
        self,
        sums: Arrays,
        prepared: Arrays,
        live_in: Arrays,
        inputs: Arrays,
        state: Arrays,
        index: Any,
    ) -> tuple[Arrays, ...]:
        """(output sums, live_out, listed outputs, new state, stash)."""
        results, stash = self.functions.forward(
            self._arguments(prepared, live_in, inputs, state, index)
        )
        return *self._split(sums, results), tuple(map(_held, stash))

    def evaluate(
        self,
        sums: Arrays,
        prepared: Arrays,
        live_in: Arrays,
        inputs: Arrays,
        state: Arrays,
        index: Any,
    ) -> tuple[Arrays, ...]:
        """(output sums, live_out, listed outputs, new state, nothing): for calls without
        gradients.
        """
        results = self.functions.run(self._arguments(prepared, live_in, inputs, state, index))
        return *self._split(sums, results), ()

    def backward(
        self,
        accumulators: Arrays,
        prepared: Arrays,
        live_in: Arrays,
        inputs: Arrays,
        state: Arrays,
        stash: Arrays,
        cotangents: Arrays,
        index: Any,
    ) -> tuple[Arrays, Arrays]:
        """(accumulators, cotangents of live_in)."""
        arguments = self._arguments(prepared, live_in, inputs, state, index)
        gradients, of_live = self.functions.backward(arguments, _local(stash), _local(cotangents))
        return _added(accumulators, gradients), tuple(map(_held, of_live))

    def input_gradients(
        self,
        accumulators: Arrays,
        prepared: Arrays,
        live_in: Arrays,
        inputs: Arrays,
        state: Arrays,
        stash: Arrays,
        cotangents: Arrays,
        index: Any,
    ) -> tuple[Arrays, ...]:
        """(accumulators of all other weights, cotangents of live_in, operands of the products)."""
        arguments = self._arguments(prepared, live_in, inputs, state, index)
        gradients, of_live, operands = self.functions.input_gradients(
            arguments, _local(stash), _local(cotangents)
        )
        return (
            _added(accumulators, gradients),
            tuple(map(_held, of_live)),
            tuple(map(_held, operands)),
        )

    def weight_gradients(self, accumulators: Arrays, operands: Arrays) -> Arrays:
        """Accumulators of the weights whose gradients are products, with this microbatch added."""
        return _added(accumulators, self.functions.weight_gradients(_local(operands)))

    def both(
        self,
        accumulators: Arrays,
        sums: Arrays,
        prepared: Arrays,
        live_in: Arrays,
        inputs: Arrays,
        state: Arrays,
        index: Any,
    ) -> tuple[Arrays, ...]:
        """(accumulators, output sums, cotangents of live_in, listed outputs, new state)."""
        arguments = self._arguments(prepared, live_in, inputs, state, index)
        results, gradients, of_live = self.functions.both(arguments)
        sums, _, listed, new_state = self._split(sums, results)
        return _added(accumulators, gradients), sums, tuple(map(_held, of_live)), listed, new_state

    def _arguments(
        self, prepared: Arrays, live_in: Arrays, inputs: Arrays, state: Arrays, index: Any
    ) -> StageArguments:
        """A microbatch's arguments; `index` counts microbatches of a replica, `number` all parts of
        the batch.
        """
        # Inside shard_map only with replicas; otherwise the program is a plain jit.
        replica = lax.axis_index(DATA) if self.replicas > 1 else 0
        rows = []
        for j, x in zip(self.functions.stage.inputs, inputs, strict=True):
            if self.in_axes[j] is not None:
                size = self.functions.inputs_avals[j].shape[0]
                # [microbatches * size, ...] of this replica -> [size, ...]
                x = lax.dynamic_slice_in_dim(x, index * size, size)
            rows.append(x)
        # The batch is split over replicas first, then over microbatches.
        number = replica * self.num_microbatches + index
        return StageArguments(_local(prepared), _local(live_in), tuple(rows), _local(state), number)

    def _split(self, sums: Arrays, results: Sequence[Any]) -> tuple[Arrays, ...]:
        """Results as (output sums, live_out, listed outputs, new state)."""
        stage = self.functions.stage
        # Order of `StageProgram.results`: live_out, outputs, new state.
        num_live = len(stage.live_out)
        by_position = dict(zip((*stage.outputs, *stage.new_state), results[num_live:], strict=True))
        return (
            _added(sums, [by_position[p] for p in self.summed]),
            tuple(map(_held, results[:num_live])),
            tuple(_held(by_position[p]) for p in self.listed),
            tuple(_held(by_position[p]) for p in stage.new_state),
        )


KINDS: Mapping[StepKind | str, str] = {
    "F": "forward",
    "E": "evaluate",
    "B": "backward",
    "I": "input_gradients",
    "W": "weight_gradients",
    "FB": "both",
}


@dataclass(frozen=True, eq=False)
class StageSignature:
    """Types and shardings of what a stage's programs take."""

    calls: StageCalls

    def of(self, kind: str) -> tuple[Any, ...]:
        """The arguments of a program, `jax.ShapeDtypeStruct`s with shardings, in groups."""
        functions = self.calls.functions
        stage, avals = functions.stage, functions.program.avals
        arguments = functions.argument_avals
        prepared = tuple(
            # Sub-meshes have one device on `stage`: shards [1, *shape] as in the loop's slots.
            self._sharded(a, (1, *a.shape), PartitionSpec(STAGE))
            for a in arguments.prepared
        )
        live_in = tuple(map(self.per_replica, arguments.live_in))
        inputs = tuple(map(self._input, stage.inputs))
        state = tuple(map(self.per_replica, arguments.state))
        index = self._sharded(arguments.number, (), PartitionSpec())
        stash = tuple(map(self.per_replica, functions.stash_avals))
        cotangents = tuple(
            # One cotangent from each consumer.
            self.per_replica(avals[x])
            for x, readers in stage.pulled.items()
            for _ in readers
        )
        accumulators = tuple(self._sum(avals[x]) for x in stage.trained)
        sums = tuple(
            self._sum(functions.program.aval(functions.program.outputs[p]))
            for p in self.calls.summed
        )
        read = (prepared, live_in, inputs, state)
        match kind:
            case "F" | "E":
                return sums, *read, index
            case "B":
                return accumulators, *read, stash, cotangents, index
            case "I":
                rest = tuple(x for j, x in enumerate(accumulators) if j not in functions.products)
                return rest, *read, stash, cotangents, index
            case "W":
                products = tuple(accumulators[j] for j in functions.products)
                return products, tuple(map(self.per_replica, functions.operand_avals))
            case "FB":
                return accumulators, sums, *read, index
        raise AssertionError(kind)

    def specs(self, kind: str) -> tuple[tuple[Any, ...], Any]:
        """(in_specs, out_specs) of a program under `shard_map`."""
        arguments = jax.tree.map(lambda x: x.sharding.spec, self.of(kind))
        # Number of groups that a program returns; W returns one tuple.
        count = {"F": 5, "E": 5, "B": 2, "I": 3, "FB": 5}.get(kind)
        return arguments, self.replica_spec if count is None else (self.replica_spec,) * count

    @property
    def replica_spec(self) -> PartitionSpec:
        return PartitionSpec(DATA) if DATA in self.calls.mesh.axis_names else PartitionSpec()

    def per_replica(self, aval: Any) -> jax.ShapeDtypeStruct:
        """The type of an array that every replica has its own shard of."""
        return self._sharded(aval, (self.calls.replicas, *aval.shape), self.replica_spec)

    def _sum(self, aval: Any) -> jax.ShapeDtypeStruct:
        return self.per_replica(jax.ShapeDtypeStruct(aval.shape, sum_dtype(aval.dtype)))

    def _input(self, j: int) -> jax.ShapeDtypeStruct:
        aval = self.calls.functions.inputs_avals[j]
        if self.calls.in_axes[j] is None:
            return self._sharded(aval, aval.shape, PartitionSpec())
        # The full batch on the column, rows split over its replicas.
        rows = aval.shape[0] * self.calls.num_microbatches * self.calls.replicas
        return self._sharded(aval, (rows, *aval.shape[1:]), self.replica_spec)

    def _sharded(
        self, aval: Any, shape: tuple[int, ...], spec: PartitionSpec
    ) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            shape, aval.dtype, sharding=NamedSharding(self.calls.mesh, spec)
        )


def jit_stage(calls: StageCalls, kind: str, name: str) -> Any:
    """A stage's program of a kind, to be lowered for `StageSignature.of`.

    Args:
      calls: the stage.
      kind: a key of `KINDS`.
      name: the program's name. Equal programs need equal names: a persistent cache compares them.
    """
    run: Callable[..., Any] = getattr(calls, KINDS[kind])
    if calls.replicas > 1:
        in_specs, out_specs = StageSignature(calls).specs(kind)
        run = jax.shard_map(
            run, mesh=calls.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    def program(*arguments: Any) -> Any:
        return run(*arguments)

    program.__name__ = program.__qualname__ = name
    # Accumulators and sums are replaced by the results of the same type.
    donated = {"F": (0,), "E": (0,), "B": (0,), "W": (0,), "I": (0,), "FB": (0, 1)}[kind]
    return jax.jit(program, donate_argnums=donated)


def _local(arrays: Sequence[Any]) -> Arrays:
    """Every device's shards [1, *shape] as values."""
    return tuple(lax.squeeze(x, (0,)) for x in arrays)


def _held(x: Any) -> Any:
    """A value as a shard [1, *shape]."""
    return lax.expand_dims(jnp.asarray(x), (0,))


def _added(sums: Sequence[Any], values: Sequence[Any]) -> Arrays:
    """Sums [1, *shape] with values [*shape] added in the type of the sums."""
    return tuple(
        # bfloat16 gradients add up in float32.
        total + _held(x).astype(total.dtype)
        for total, x in zip(sums, values, strict=True)
    )
