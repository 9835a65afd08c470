"""Run a neural network layer-wise: every device holds a contiguous group of layers that fits its on-chip cache.

    import layerwise_jax as lw

    pipeline = lw.layerwise(model.apply, params, tokens)
    print(pipeline.plan)
    staged = pipeline.place(params)
    logits = jax.jit(pipeline)(staged, tokens)
    loss, grads = jax.jit(pipeline.value_and_grad)(staged, batch)  # where the function returns a scalar loss
    params = pipeline.gather(staged)

Names are loaded when they are first used, so that planning, which is plain numbers, does not import JAX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layerwise_jax.batching import BatchError
    from layerwise_jax.build import build_pipeline
    from layerwise_jax.checkpoint import (
        Checkpoint,
        checkpoint_steps,
        read_checkpoint,
        restore_checkpoint,
        save_checkpoint,
    )
    from layerwise_jax.checkpoint_files import CheckpointError
    from layerwise_jax.comparison import Comparison, compare_dense, compare_work
    from layerwise_jax.comparison_trace import compare, compare_decode
    from layerwise_jax.cost import LayerCost
    from layerwise_jax.decode import decode_ring
    from layerwise_jax.detect import detect_device
    from layerwise_jax.device_spec import DeviceSpec
    from layerwise_jax.devices import A100, B200, CPU, H100, H200, L4, L40S
    from layerwise_jax.entry import layerwise, stage_mesh
    from layerwise_jax.generation import Generation
    from layerwise_jax.layers import LayerSequence, trace_layers
    from layerwise_jax.measure import measure_costs
    from layerwise_jax.partition import CapacityError, Partition, partition_layers, solve, solve_measured
    from layerwise_jax.pipeline import Pipeline
    from layerwise_jax.plan import Plan
    from layerwise_jax.ring import DecodeRing
    from layerwise_jax.sampling import Sampler
    from layerwise_jax.schedule import Schedule, ScheduleError
    from layerwise_jax.simulate import predict
    from layerwise_jax.simulate_calibration import Calibration
    from layerwise_jax.simulate_fit import fit_calibration
    from layerwise_jax.simulate_prediction import Prediction
    from layerwise_jax.simulate_strategy import Strategy
    from layerwise_jax.simulate_work import StepWork, dense_decode, dense_prefill
    from layerwise_jax.stages import CutError

_HOMES = {
    "entry": ("layerwise", "stage_mesh"),
    "layers": ("trace_layers", "LayerSequence"),
    "measure": ("measure_costs",),
    "partition": ("partition_layers", "solve", "solve_measured", "Partition", "CapacityError"),
    "build": ("build_pipeline",),
    "pipeline": ("Pipeline",),
    "plan": ("Plan",),
    "cost": ("LayerCost",),
    "device_spec": ("DeviceSpec",),
    "devices": ("A100", "B200", "CPU", "H100", "H200", "L4", "L40S"),
    "detect": ("detect_device",),
    "batching": ("BatchError",),
    "stages": ("CutError",),
    "checkpoint": ("save_checkpoint", "restore_checkpoint", "read_checkpoint", "checkpoint_steps", "Checkpoint"),
    "comparison_trace": ("compare", "compare_decode"),
    "comparison": ("Comparison", "compare_work", "compare_dense"),
    "simulate": ("predict",),
    "simulate_work": ("StepWork", "dense_decode", "dense_prefill"),
    "simulate_strategy": ("Strategy",),
    "simulate_prediction": ("Prediction",),
    "simulate_calibration": ("Calibration",),
    "simulate_fit": ("fit_calibration",),
    "decode": ("decode_ring",),
    "ring": ("DecodeRing",),
    "generation": ("Generation",),
    "sampling": ("Sampler",),
    "schedule": ("Schedule", "ScheduleError"),
    "checkpoint_files": ("CheckpointError",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

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
    "detect_device",
    "save_checkpoint",
    "restore_checkpoint",
    "read_checkpoint",
    "checkpoint_steps",
    "LayerSequence",
    "LayerCost",
    "Partition",
    "Pipeline",
    "Plan",
    "DeviceSpec",
    "Checkpoint",
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


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'layerwise_jax' has no attribute '{name}'")
    return getattr(importlib.import_module(f"layerwise_jax.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
