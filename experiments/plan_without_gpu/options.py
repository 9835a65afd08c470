"""Flags of the plans for absent GPUs."""

from absl import flags

from experiments.plan_without_gpu import names
from layerwise_jax.cost import DEVICES

GPUS = [device.name for device in DEVICES if device.compute_capability]

DEVICE = flags.DEFINE_enum("device", "NVIDIA H100 80GB HBM3", GPUS, "device to plan for")
MODELS = flags.DEFINE_multi_enum("models", names.MODELS_BY_DEFAULT, names.MODELS, "models to plan")
