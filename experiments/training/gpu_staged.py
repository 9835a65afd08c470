"""The model layer-wise: one stage per device, by the schedule 1F1B."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import layerwise_jax as lw
from experiments.training.gpu_model import Model
from experiments.training.gpu_strategies import Strategy


@dataclass(frozen=True)
class StagedModel:
    """The model as a pipeline, with its figures for results.

    Attributes:
      pipeline: the pipeline.
      how: stages, schedule and bubble, in words.
      figures: cut points, loads and bubble.
    """

    pipeline: Any
    how: str
    figures: dict[str, Any]


def stage_model(
    model: Model, devices: Sequence[Any], examples: int, microbatches: int, **choices: Any
) -> StagedModel:
    """Contiguous layers on each device, balanced by their arithmetic, by the schedule 1F1B.

    Args:
      model: the model.
      devices: a stage on each.
      examples: of a global batch.
      microbatches: how many.
      **choices: options of `lw.build_pipeline`.
    """
    tokens = jax.ShapeDtypeStruct((examples // microbatches, model.sequence + 1), jnp.int32)
    layers = lw.trace_layers(model.loss, model.shapes(), tokens)
    seconds = [_load(model, layer.name) for layer in layers.layers]
    partition = lw.solve(seconds, None, max_stages=len(devices), exactly=True)
    mesh = Mesh(np.array(devices), ("stage",), axis_types=(AxisType.Auto,))
    pipeline = lw.build_pipeline(
        layers,
        partition,
        mesh,
        microbatches,
        reduce="mean",
        # The analysis of microbatching cannot look into cuDNN's kernel, which treats each example
        # alone.
        batch_statistics="per_microbatch" if model.attention == "cudnn" else None,
        **{"schedule": "1f1b", **choices},
    )
    bubble = (len(devices) - 1) / (microbatches + len(devices) - 1)
    figures = {
        "microbatches": microbatches,
        "boundaries": list(partition.boundaries),
        "layers": [layer.name for layer in layers.layers],
        "stage_loads": _stage_loads(seconds, partition.boundaries),
        "bubble": bubble,
    }
    how = f"{len(devices)} stages, 1F1B, {microbatches} microbatches, bubble {bubble:.1%}"
    return StagedModel(pipeline, how, figures)


# By residual policy: the strategy's name, and what its backward goes by.
BACKWARDS = {
    None: ("stored", "residuals stored for backward"),
    "cheap": ("cheap", "products and attention kept, the rest recomputed"),
    "stage": ("recomputed", "backward recomputes its stage"),
}


def layer_wise(
    model: Model,
    devices: Sequence[Any],
    examples: int,
    microbatches: int,
    remat: Literal["stage", "cheap"] | None,
    options: dict[str, Any],
) -> Strategy:
    """All stages in one program; backward recomputes a stage, part of it, or nothing."""
    staged = stage_model(model, devices, examples, microbatches, remat=remat, executor="loop")
    pipeline = staged.pipeline
    shapes = pipeline.place(model.shapes())
    whole = NamedSharding(pipeline.mesh, PartitionSpec())
    kind, backward = BACKWARDS[remat]
    return Strategy(
        name=f"layer-wise, M = {microbatches}, {kind}",
        how=f"{staged.how}, {backward}",
        devices=len(devices),
        shapes=shapes,
        place=pipeline.place,
        value_and_grad=pipeline.value_and_grad,
        shardings=jax.tree.map(lambda shape: shape.sharding, shapes),
        whole=whole,
        tokens=whole,
        options=options,
        figures={
            **staged.figures,
            "body_layers": pipeline.loop.alignment.num_layers,
            "padding_bytes": pipeline.placement.padding_bytes,
        },
    )


def _load(model: Model, name: str) -> float:
    """FLOPs of a layer per token; lookups and norms have next to none."""
    if name.startswith("block"):
        return model.block_flops
    return model.logits_flops if name == "embed (use 2)" else 0.0


def _stage_loads(loads: Sequence[float], boundaries: Sequence[int]) -> list[float]:
    """Share of every stage in the total FLOPs."""
    total = sum(loads)
    return [sum(loads[start:stop]) / total for start, stop in pairwise(boundaries)]
