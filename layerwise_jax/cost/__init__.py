"""Costs and devices as plain numbers. Imports no JAX."""

from layerwise_jax.cost.capacity import WIDTHS, CapacityBound, capacity_bound, streaming_notes
from layerwise_jax.cost.device import DeviceSpec
from layerwise_jax.cost.devices import A100, B200, CPU, DEVICES, H100, H200, L4, L40S, device_named
from layerwise_jax.cost.layer_cost import LayerCost, total
from layerwise_jax.cost.memory import MemoryLevel

__all__ = [
    "LayerCost",
    "total",
    "DeviceSpec",
    "MemoryLevel",
    "A100",
    "B200",
    "CPU",
    "DEVICES",
    "H100",
    "H200",
    "L4",
    "L40S",
    "device_named",
    "WIDTHS",
    "CapacityBound",
    "capacity_bound",
    "streaming_notes",
]
