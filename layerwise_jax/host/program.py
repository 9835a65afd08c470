"""Everything that executor `host` decides before its first step, from the staged program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from layerwise_jax.host.column_calls import ColumnCalls
from layerwise_jax.host.column_programs import column_programs
from layerwise_jax.host.column_run import Routes
from layerwise_jax.host.compiled import StageCalls
from layerwise_jax.host.differentiate import StageFunctions
from layerwise_jax.host.placement import HostPlacement, place_columns
from layerwise_jax.host.stage_program import StageProgram, prelude_ops, split_stages
from layerwise_jax.host.workers import Key
from layerwise_jax.mesh import DATA, STAGE
from layerwise_jax.options import Remat
from layerwise_jax.run.outputs import Outputs
from layerwise_jax.schedule.columns import Column, StageTraits, forward_columns, lay_out_columns
from layerwise_jax.schedule.table import Schedule
from layerwise_jax.stage.staged_program import StagedProgram
from layerwise_jax.trace.derivative import is_inexact
from layerwise_jax.trace.layers import Signature
from layerwise_jax.trace.program import Op, Weight


@dataclass(frozen=True, eq=False)
class HostProgram:
    """A pipeline's stages as programs, columns and routes.

    Attributes:
      staged: the program, its stages, state and frozen weights.
      signature: trees and types of parameters and inputs.
      outputs: how the function's outputs combine over microbatches.
      schedule: the order of forwards and backwards.
      seed: the cotangent of the loss of one microbatch.
      remat: what forward keeps for backward: see `StageFunctions`.
      options: XLA options of all programs.
      widens: whether weight gradients that are products are made in float32. None: on accelerators,
        which multiply bfloat16 into float32; a CPU would convert the operands.
    """

    staged: StagedProgram
    signature: Signature
    outputs: Outputs
    schedule: Schedule
    seed: float
    remat: Remat | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    widens: bool | None = None

    @property
    def mesh(self) -> Mesh:
        return self.outputs.mesh

    @property
    def devices(self) -> Mapping[int, int]:
        """The column of every stage."""
        return self.schedule.device_of_stage

    @cached_property
    def trained(self) -> frozenset[Weight]:
        """The weights that have a gradient."""
        program, held_back = self.staged.program, {*self.staged.frozen, *self.staged.state.values()}
        # Trained: floating-point, neither frozen nor state.
        weights = program.weights.items()
        return frozenset(
            w for x, w in weights if w not in held_back and is_inexact(program.avals[x])
        )

    @cached_property
    def stages(self) -> tuple[StageProgram, ...]:
        staged = self.staged
        prelude = self._prelude
        return split_stages(
            staged.program, staged.stages, prelude, self.devices, staged.state, self.trained
        )

    @cached_property
    def placement(self) -> HostPlacement:
        """Placement: the slot and the column of every weight."""
        staged = self.staged
        return place_columns(
            staged.program, staged.stages, self.devices, self.signature, self.mesh, staged.state
        )

    @cached_property
    def columns(self) -> tuple[Column, ...]:
        """Steps of every column in a training step, in the schedule's order."""
        # Products are looked for where the schedule splits backwards: that traces them.
        splits = any(action.kind == "W" for _, _, action in self.schedule.actions())
        traits = [
            StageTraits(
                sends=bool(calls.functions.stage.live_out),
                has_state=bool(calls.functions.stage.state),
                has_backward=calls.functions.stage.has_backward,
                has_products=splits and bool(calls.functions.products),
            )
            for calls in self.calls
        ]
        return lay_out_columns(self.schedule, traits)

    @cached_property
    def calls(self) -> tuple[StageCalls, ...]:
        staged = self.staged
        on_accelerator = self.mesh.devices.flat[0].platform != "cpu"
        return tuple(
            StageCalls(
                StageFunctions(
                    staged.program,
                    stage,
                    staged.inputs_avals,
                    self.seed,
                    self.remat,
                    on_accelerator if self.widens is None else self.widens,
                ),
                self.placement.meshes[stage.device],
                staged.in_axes,
                staged.num_microbatches,
                self.outputs.roles,
                tuple(staged.state[p] for p in stage.new_state),
            )
            for stage in self.stages
        )

    @cached_property
    def column_calls(self) -> tuple[ColumnCalls, ...]:
        """The once-a-step programs of every column."""
        meshes = self.placement.meshes
        replicas = self.mesh.shape.get(DATA, 1)
        programs = column_programs(
            self.staged.program, self.stages, self._prelude, self.trained, len(meshes), replicas
        )
        # A weight with slots on several columns.
        tied = frozenset(
            weight for weight, places in self.placement.copies().items() if len(places) > 1
        )
        made = [
            tuple(p for s in self.stages if s.device == c for p in s.outputs)
            for c in range(len(meshes))
        ]
        return tuple(
            ColumnCalls(program, mesh, self.outputs, positions, tied, self.options)
            for program, mesh, positions in zip(programs, meshes, made, strict=True)
        )

    def messages(self, trains: bool) -> list[Key]:
        keys = []
        for stage in self.stages:
            for m in range(self.staged.num_microbatches):
                # One box a message and step: no box is used twice, so order needs no lock.
                keys += [Key("activation", x, stage.stage, m) for x in stage.live_in]
                keys += [
                    Key("cotangent", x, stage.stage, m) for x in stage.differentiated if trains
                ]
        return keys

    def input_sharding(self, column: int, position: int) -> NamedSharding:
        split = self.staged.in_axes[position] is not None and DATA in self.mesh.axis_names
        return NamedSharding(
            self.placement.meshes[column], PartitionSpec(DATA) if split else PartitionSpec()
        )

    @cached_property
    def _prelude(self) -> list[Op]:
        return prelude_ops(self.staged.program, frozenset(self.staged.state.values()))

    @cached_property
    def forward_columns(self) -> tuple[Column, ...]:
        return forward_columns(self.schedule)

    @cached_property
    def routes(self) -> Routes:
        spec = PartitionSpec(DATA) if DATA in self.mesh.axis_names else PartitionSpec()
        return Routes(
            [stage.device for stage in self.stages],
            {x: stage.device for stage in self.stages for x in stage.live_out},
            [NamedSharding(mesh, spec) for mesh in self.placement.meshes],
        )

    @cached_property
    def indices(self) -> list[list[Any]]:
        """The number of every microbatch on every column: an array, so that one program serves
        all.
        """
        shardings = [NamedSharding(mesh, PartitionSpec()) for mesh in self.placement.meshes]
        count = self.staged.num_microbatches
        return [
            [jax.device_put(np.int32(m), sharding) for m in range(count)] for sharding in shardings
        ]

    @cached_property
    def slot_shardings(self) -> list[NamedSharding]:
        return [NamedSharding(mesh, PartitionSpec(STAGE)) for mesh in self.placement.meshes]
