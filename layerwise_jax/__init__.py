"""Pipeline parallelism by automatic stage cutting: each device holds layers that fit its cache.

    import layerwise_jax as lw

    pipeline = lw.layerwise(model.apply, params, tokens)
    print(pipeline.plan)
    staged = pipeline.place(params)
    logits = jax.jit(pipeline)(staged, tokens)
    loss, grads = jax.jit(pipeline.value_and_grad)(staged, batch)  # of a function with scalar loss
    params = pipeline.gather(staged)

Names are loaded when they are first used, so that planning, which is plain numbers, does not import
JAX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layerwise_jax.batch.analysis import BatchError
    from layerwise_jax.build import build_pipeline
    from layerwise_jax.checkpoint.leaves import CheckpointError
    from layerwise_jax.checkpoint.save import (
        Checkpoint,
        checkpoint_steps,
        read_checkpoint,
        restore_checkpoint,
        save_checkpoint,
    )
    from layerwise_jax.checkpoint.writer import CheckpointWriter
    from layerwise_jax.comparison import compare, compare_decode
    from layerwise_jax.cost.device import DeviceSpec
    from layerwise_jax.cost.devices import A100, B200, CPU, H100, H200, L4, L40S
    from layerwise_jax.cost.layer_cost import LayerCost
    from layerwise_jax.decode.build import decode_ring
    from layerwise_jax.decode.generation import Generation
    from layerwise_jax.decode.options import DecodeOptions
    from layerwise_jax.decode.ring import DecodeRing
    from layerwise_jax.decode.sampling import Sampler
    from layerwise_jax.entry import layerwise
    from layerwise_jax.measure.detect import detect_device
    from layerwise_jax.measure.layers import measure_costs
    from layerwise_jax.mesh import emulate_devices, stage_mesh
    from layerwise_jax.options import PipelineOptions
    from layerwise_jax.partition.solver import (
        CapacityError,
        Partition,
        partition_layers,
        solve,
        solve_measured,
    )
    from layerwise_jax.pipeline import Pipeline
    from layerwise_jax.plan import Plan
    from layerwise_jax.schedule.table import Schedule, ScheduleError
    from layerwise_jax.simulate.calibration import Calibration
    from layerwise_jax.simulate.comparison import Comparison, compare_dense, compare_work
    from layerwise_jax.simulate.fit import fit_calibration
    from layerwise_jax.simulate.prediction import Prediction
    from layerwise_jax.simulate.predictor import predict
    from layerwise_jax.simulate.strategy import Strategy
    from layerwise_jax.simulate.work import StepWork, dense_decode, dense_prefill
    from layerwise_jax.stage.cut import CutError
    from layerwise_jax.trace.layers import LayerSequence, trace_layers

_HOMES = {
    "entry": ("layerwise",),
    "mesh": ("stage_mesh", "emulate_devices"),
    "trace.layers": ("trace_layers", "LayerSequence"),
    "measure.layers": ("measure_costs",),
    "partition.solver": (
        "partition_layers",
        "solve",
        "solve_measured",
        "Partition",
        "CapacityError",
    ),
    "build": ("build_pipeline",),
    "pipeline": ("Pipeline",),
    "options": ("PipelineOptions",),
    "plan": ("Plan",),
    "cost.layer_cost": ("LayerCost",),
    "cost.device": ("DeviceSpec",),
    "cost.devices": ("A100", "B200", "CPU", "H100", "H200", "L4", "L40S"),
    "measure.detect": ("detect_device",),
    "batch.analysis": ("BatchError",),
    "stage.cut": ("CutError",),
    "checkpoint.save": (
        "save_checkpoint",
        "restore_checkpoint",
        "read_checkpoint",
        "checkpoint_steps",
        "Checkpoint",
    ),
    "comparison": ("compare", "compare_decode"),
    "simulate.comparison": ("Comparison", "compare_work", "compare_dense"),
    "simulate.predictor": ("predict",),
    "simulate.work": ("StepWork", "dense_decode", "dense_prefill"),
    "simulate.strategy": ("Strategy",),
    "simulate.prediction": ("Prediction",),
    "simulate.calibration": ("Calibration",),
    "simulate.fit": ("fit_calibration",),
    "decode.build": ("decode_ring",),
    "decode.options": ("DecodeOptions",),
    "decode.ring": ("DecodeRing",),
    "decode.generation": ("Generation",),
    "decode.sampling": ("Sampler",),
    "schedule.table": ("Schedule", "ScheduleError"),
    "checkpoint.leaves": ("CheckpointError",),
    "checkpoint.writer": ("CheckpointWriter",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__version__ = "0.1.0"

__all__ = [
    "layerwise",
    "trace_layers",
    "measure_costs",
    "partition_layers",
    "build_pipeline",
    "decode_ring",
    "compare",
    "compare_decode",
    "compare_work",
    "compare_dense",
    "predict",
    "dense_decode",
    "dense_prefill",
    "fit_calibration",
    "solve",
    "solve_measured",
    "stage_mesh",
    "emulate_devices",
    "detect_device",
    "save_checkpoint",
    "restore_checkpoint",
    "read_checkpoint",
    "checkpoint_steps",
    "LayerSequence",
    "LayerCost",
    "Partition",
    "Pipeline",
    "PipelineOptions",
    "Plan",
    "DeviceSpec",
    "Checkpoint",
    "CheckpointWriter",
    "DecodeOptions",
    "DecodeRing",
    "Comparison",
    "Prediction",
    "Strategy",
    "StepWork",
    "Calibration",
    "Generation",
    "Sampler",
    "Schedule",
    "A100",
    "B200",
    "CPU",
    "H100",
    "H200",
    "L4",
    "L40S",
    "BatchError",
    "CapacityError",
    "CheckpointError",
    "CutError",
    "ScheduleError",
]


# Folders and the module `mesh`, whose public names users reach as `lw.partition.solve`.
_NAMESPACES = frozenset(
    "batch checkpoint cost decode examples measure mesh partition run schedule simulate stage "
    "trace train xla".split()
)


def __getattr__(name: str) -> Any:
    if name in _NAMESPACES:
        return importlib.import_module(f"layerwise_jax.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'layerwise_jax' has no attribute '{name}'")
    return getattr(importlib.import_module(f"layerwise_jax.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *_NAMESPACES})
