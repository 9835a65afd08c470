"""Whether a model can be resident in cache at all, in plain numbers: the capacity law for a model
and a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from layerwise_jax.cost.device import DeviceSpec
from layerwise_jax.cost.layer_cost import LayerCost

# The widths at which weights are commonly kept, by the number of their bits.
WIDTHS = {16: "fp16", 8: "fp8", 4: "4 bits"}

# Those that are named only for weights that have them.
WIDER = {64: "fp64", 32: "fp32"}


@dataclass(frozen=True)
class CapacityBound:
    """The capacity law for one model on one device.

    Attributes:
      device: the device's name.
      usable_bytes: what one device may hold: its usable cache, or the capacity that was given.
      weight_bytes: weights of all layers as they are, shared ones once.
      resident_bytes: what all the devices hold together.
      num_devices: how many there are.
      devices_needed: for each width in bits, the weights' own and the common ones, how many of them
        hold all weights.
      largest_layer: the name of the layer with the most weights.
      largest_layer_bytes: its weights.
      tensor_ways: for each width, over how many devices that layer must be split to fit.
    """

    device: str
    usable_bytes: int
    weight_bytes: int
    resident_bytes: int
    num_devices: int
    devices_needed: dict[int, int]
    largest_layer: str
    largest_layer_bytes: int
    tensor_ways: dict[int, int]

    @property
    def is_resident(self) -> bool:
        """Whether the weights alone could be resident."""
        return (
            self.resident_bytes >= self.weight_bytes
            and self.largest_layer_bytes <= self.usable_bytes
        )

    def __str__(self) -> str:
        names = WIDER | WIDTHS
        needed = ", ".join(
            f"{count:,} at {names[bits]}" for bits, count in self.devices_needed.items()
        )
        ways = ", ".join(f"{count} at {names[bits]}" for bits, count in self.tensor_ways.items())
        return (
            f"{self.weight_bytes:,} bytes of weights; {self.num_devices} x {self.device} hold "
            f"{self.resident_bytes:,} bytes in cache ({self.usable_bytes:,} each). Devices "
            f"needed: {needed}. "
            f"The largest layer, '{self.largest_layer}', has {self.largest_layer_bytes:,} bytes; "
            f"tensor ways: {ways}."
        )


def capacity_bound(
    costs: Sequence[LayerCost],
    device: DeviceSpec,
    num_devices: int,
    bits: int = 16,
    capacity: int | None = None,
    weight_bytes: int | None = None,
) -> CapacityBound:
    """Apply the capacity law: resident parameters = devices x usable bytes x 8 / bits.

    Args:
      costs: the layers.
      device: the device.
      num_devices: how many there are.
      bits: the width in which the costs count weights.
      capacity: bytes that a device may hold; None for its usable cache.
      weight_bytes: weights of all layers, those that several layers use counted once; None if no
        layers share any.
    """
    weights = sum(cost.weight_bytes for cost in costs) if weight_bytes is None else weight_bytes
    largest = max(costs, key=lambda cost: cost.weight_bytes)
    usable = device.usable_l2_bytes if capacity is None else max(capacity, 1)
    widths = [*(width for width in WIDER if width == bits), *WIDTHS]
    return CapacityBound(
        device=device.name,
        usable_bytes=usable,
        weight_bytes=weights,
        resident_bytes=num_devices * usable,
        num_devices=num_devices,
        devices_needed={width: max(1, -(-weights * width // (bits * usable))) for width in widths},
        largest_layer=largest.name,
        largest_layer_bytes=largest.weight_bytes,
        tensor_ways={
            width: max(1, -(-largest.weight_bytes * width // (bits * usable))) for width in widths
        },
    )


def row_chunks_to_fit(cost: LayerCost, capacity: int) -> int | None:
    """Into how many chunks of rows a layer's activations must be cut for it to fit; None if its
    weights do not.
    """
    room = capacity - cost.weight_bytes
    return None if room <= 0 else max(1, -(-(cost.activation_bytes + cost.buffer_bytes) // room))


def streaming_notes(groups: Sequence[Sequence[LayerCost]], device: DeviceSpec) -> list[str]:
    """For stages that exceed the cache: how many bytes stream from memory each tick, and what that
    takes.
    """
    notes = []
    for s, group in enumerate(groups):
        excess = sum(cost.size for cost in group) - device.usable_l2_bytes
        if excess > 0:
            microseconds = excess / device.memory_bandwidth * 1e6
            notes.append(
                f"stage {s} holds {excess:,} bytes more than the cache: they stream from memory "
                "every tick, "
                f"{microseconds:,.1f} us at {device.memory_bandwidth / 1e12:.2f} TB/s"
            )
    return notes
