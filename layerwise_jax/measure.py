"""What every layer holds and does, read from compiled programs."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax

from layerwise_jax._jax import Literal
from layerwise_jax.cost import LayerCost
from layerwise_jax.layers import LayerSequence
from layerwise_jax.plan import Sizes
from layerwise_jax.program import Operand, Program, Rows, Value, evaluate, nbytes
from layerwise_jax.stages import Stage, cut_stages
from layerwise_jax.structure import shape_of


def measure_costs(layers: LayerSequence) -> tuple[LayerCost, ...]:
    """Compile every structurally distinct layer once, on the backend that is there, and read its cost.

    No weight is in memory: layers are compiled from shapes alone.

    Args:
      layers: the layers of one microbatch; the sizes are that microbatch's.

    Returns:
      A `LayerCost` a layer: bytes of its weights, of what it passes on (the output feature map), and of the workspace
      that the compiler allocates inside it.
    """
    program = layers.program
    stages = cut_stages(layers, range(len(layers) + 1))
    fingerprints: dict[int, Hashable] = {}
    measured: dict[Hashable, Mapping[str, float]] = {}
    costs = []
    for stage in stages:
        made = made_outside(stage)
        shape = shape_of(program, stage.ops, fingerprints)
        key = shape.key, tuple(shape.made.index(x) for x in made)
        if key not in measured:
            measured[key] = _compiled_cost(program, stage, shape.weights + shape.reads, made)
        costs.append(_layer_cost(program, stage, made, measured[key]))
    return tuple(costs)


def measured_by_shape(layers: LayerSequence) -> Sizes:
    """Weights and outputs of every layer, without compiling; the workspace is unknown and counted as nothing."""
    stages = cut_stages(layers, range(len(layers) + 1))
    nothing = {"temporary": 0, "flops": 0.0, "accessed": 0.0}
    costs = tuple(_layer_cost(layers.program, stage, made_outside(stage), nothing) for stage in stages)
    return Sizes(costs, "any device", "shapes alone, without workspace")


def made_outside(stage: Stage) -> tuple[Value, ...]:
    """The values that a stage makes and others, or the caller, use."""
    made = stage.made
    used: list[Operand] = [*stage.sends, *stage.outputs.values()]
    return tuple(dict.fromkeys(x for x in used if not isinstance(x, Literal) and x in made))


def _layer_cost(program: Program, stage: Stage, made: Sequence[Value], measured: Mapping[str, float]) -> LayerCost:
    return LayerCost(
        name=stage.layers[0],
        weight_bytes=sum(nbytes(program.avals[x]) for x in stage.weights),
        activation_bytes=sum(nbytes(program.avals[x]) for x in made),
        buffer_bytes=int(measured["temporary"]),
        flops=measured["flops"],
        bytes_accessed=measured["accessed"],
    )


def _compiled_cost(
    program: Program, stage: Stage, reads: Sequence[Value], made: Sequence[Value]
) -> Mapping[str, float]:
    """Temporary bytes, flops and bytes accessed of one layer, from its compiled program."""

    def run(*values: Any) -> list[Any]:
        env = {**program.constants, **dict(zip(reads, values, strict=True))}
        return evaluate(stage.ops, env, made, Rows(0))

    avals = [jax.ShapeDtypeStruct(program.avals[x].shape, program.avals[x].dtype) for x in reads]
    compiled = jax.jit(run).lower(*avals).compile()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    return {
        "temporary": memory.temp_size_in_bytes,
        "flops": max(cost.get("flops", 0.0), 0.0),
        "accessed": max(cost.get("bytes accessed", 0.0), 0.0),
    }
