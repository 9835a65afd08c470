"""Memory footprint and work of layers and stages, from programs compiled for the given device."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from layerwise_jax import processes
from layerwise_jax._jax import Literal
from layerwise_jax.cost.device import DeviceSpec
from layerwise_jax.cost.layer_cost import LayerCost
from layerwise_jax.plan import Sizes
from layerwise_jax.stage.cut import Stage, cut_stages
from layerwise_jax.trace.canonical import CanonicalOps, canonicalize
from layerwise_jax.trace.derivative import is_inexact, vjp_wrt
from layerwise_jax.trace.flops import count_work
from layerwise_jax.trace.layers import LayerSequence
from layerwise_jax.trace.program import Operand, Value, evaluate, nbytes
from layerwise_jax.xla.aot import CompiledProgram, can_compile_for_absent_gpus, compile_for


def measure_costs(
    layers: LayerSequence, device: DeviceSpec | None = None, *, backward: bool = False
) -> tuple[LayerCost, ...]:
    """Cost of every layer; equal layers are compiled once, and no array is made.

    Args:
      layers: layers of one microbatch; sizes are those of this microbatch.
      device: device to compile for, present or not; None for the local one.
      backward: compile forward and backward instead of forward.

    Returns:
      One `LayerCost` per layer: bytes of its weights, of the activations that it sends on, and of
      the workspace that the compiler allocates.
    """
    return CompiledCosts(layers, device, backward=backward).costs()


@dataclass(eq=False)
class CompiledCosts:
    """Compiled costs of layers and of runs of layers on one device, with a cache of programs.

    Attributes:
      layers: layers of one microbatch.
      device: device to compile for; None for the local one.
      backward: whether programs include the backward pass.
      num_compiles: number of programs compiled so far.
    """

    layers: LayerSequence
    device: DeviceSpec | None = None
    backward: bool = False
    num_compiles: int = 0
    _fingerprints: dict[int, Hashable] = field(default_factory=dict, repr=False)
    _known: dict[Hashable, CompiledProgram | None] = field(default_factory=dict, repr=False)

    @property
    def compiler(self) -> str:
        """Name of the compiler and device behind the sizes, for the plan."""
        if self._is_local:
            return f"XLA for the local {processes.local_device().device_kind}"
        if can_compile_for_absent_gpus():
            return f"XLA:GPU for {self._spec.name}, which is not here"
        return "shapes only: there is no compiler for this device here (the extra 'aot' brings it)"

    @property
    def _spec(self) -> DeviceSpec:
        assert self.device is not None
        return self.device

    @property
    def _is_local(self) -> bool:
        """True if the local backend compiles: no GPU was named, or the local device is that GPU.

        Otherwise an ahead-of-time GPU compiler is needed: a CPU's workspace differs from a GPU's.
        """
        if self.device is None or self.device.compute_capability is None:
            return True
        return processes.local_device().device_kind == self.device.name

    def costs(self) -> tuple[LayerCost, ...]:
        """Cost of every layer."""
        return tuple(
            self._cost(stage) for stage in cut_stages(self.layers, range(len(self.layers) + 1))
        )

    def stage_bytes(self, start: int, stop: int) -> int:
        """Peak bytes of layers start..stop-1 compiled as one stage.

        Less than the sum of the layers' sizes, since layers reuse one workspace. Without a compiler
        it is that sum.
        """
        boundaries = sorted({0, start, stop, len(self.layers)})
        stage = cut_stages(self.layers, boundaries)[boundaries.index(start)]
        compiled = self._compiled(stage, self._shape(stage))
        if compiled is None:
            return sum(
                self._cost(each).size
                for each in cut_stages(self.layers, range(len(self.layers) + 1))[start:stop]
            )
        return compiled.peak_bytes

    def _cost(self, stage: Stage) -> LayerCost:
        shape = self._shape(stage)
        made = made_outside(stage)
        compiled = self._compiled(stage, shape)
        avals = self.layers.program.avals
        work = compiled or count_work(
            jax.make_jaxpr(self._function(stage, shape))(*self._arguments(shape))
        )
        return LayerCost(
            name=stage.layers[0],
            weight_bytes=sum(nbytes(avals[x]) for x in shape.weights),
            activation_bytes=sum(nbytes(avals[x]) for x in made),
            buffer_bytes=compiled.temp_bytes + compiled.constant_bytes if compiled else 0,
            flops=work.flops,
            bytes_accessed=work.bytes_accessed,
            peak_bytes=compiled.peak_bytes if compiled else 0,
        )

    def _shape(self, stage: Stage) -> CanonicalOps:
        return canonicalize(self.layers.program, stage.ops, self._fingerprints)

    def _compiled(self, stage: Stage, shape: CanonicalOps) -> CompiledProgram | None:
        """Compiled program of a stage, from the cache for equal stages; None without a compiler."""
        key = shape.key, tuple(shape.made.index(x) for x in made_outside(stage))
        if key not in self._known:
            self._known[key] = self._compile(stage, shape)
        return self._known[key]

    def _compile(self, stage: Stage, shape: CanonicalOps) -> CompiledProgram | None:
        if not self._is_local and not can_compile_for_absent_gpus():
            return None
        self.num_compiles += 1
        target = None if self._is_local else self.device
        return compile_for(
            target, self._function(stage, shape), self._arguments(shape), weights=[0]
        )

    def _arguments(self, shape: CanonicalOps) -> tuple[list[Any], list[Any]]:
        avals = self.layers.program.avals

        def shapes(values: Sequence[Value]) -> list[Any]:
            return [jax.ShapeDtypeStruct(avals[x].shape, avals[x].dtype) for x in values]

        return shapes(shape.weights), shapes(shape.reads)

    def _function(self, stage: Stage, shape: CanonicalOps) -> Any:
        """Function (weights, reads) -> results or, with `backward`, (results, gradients)."""
        program = self.layers.program
        made = made_outside(stage)
        names = (*shape.weights, *shape.reads)

        def forward(weights: list[Any], reads: list[Any]) -> list[Any]:
            env = {**program.constants, **dict(zip(names, (*weights, *reads), strict=True))}
            return evaluate(stage.ops, env, made)

        def forward_and_backward(weights: list[Any], reads: list[Any]) -> Any:
            def run(values: dict[int, Any]) -> list[Any]:
                flat = [values[i] for i in range(len(names))]
                results = forward(flat[: len(weights)], flat[len(weights) :])
                return [x for x in results if is_inexact(x)]

            values = dict(enumerate([*weights, *reads]))
            moving = [i for i, x in values.items() if is_inexact(x)]
            results, vjp_fn = vjp_wrt(run, values, moving)
            return results, vjp_fn([jnp.ones_like(x) for x in results])

        return forward_and_backward if self.backward else forward


def measured_by_shape(layers: LayerSequence) -> Sizes:
    """Sizes of every layer from shapes, without compiling; workspace counts as 0."""
    avals = layers.program.avals
    costs = tuple(
        LayerCost(
            stage.layers[0],
            weight_bytes=sum(nbytes(avals[x]) for x in stage.weights),
            activation_bytes=sum(nbytes(avals[x]) for x in made_outside(stage)),
            buffer_bytes=0,
        )
        for stage in cut_stages(layers, range(len(layers) + 1))
    )
    return Sizes(costs, "any device", "shapes only, without workspace")


def made_outside(stage: Stage) -> tuple[Value, ...]:
    """Values that a stage computes for other stages or as outputs."""
    made = stage.made
    used: list[Operand] = [*stage.sends, *stage.outputs.values()]
    return tuple(dict.fromkeys(x for x in used if not isinstance(x, Literal) and x in made))
