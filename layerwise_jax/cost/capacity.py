"""Capacity law: the devices whose caches together hold a model's weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from layerwise_jax._tables import bytes_text, plural
from layerwise_jax.cost.device import DeviceSpec
from layerwise_jax.cost.layer_cost import LayerCost

# Common widths of weights: bits -> name.
WIDTHS = {16: "fp16", 8: "fp8", 4: "4 bits"}

# Widths that are listed only if the weights have them.
WIDER = {64: "fp64", 32: "fp32"}
NAMES = WIDER | WIDTHS


@dataclass(frozen=True)
class CapacityBound:
    """Capacity law of one model on one kind of device: required and available bytes.

    Attributes:
      device: name of the device.
      usable_bytes: bytes that one device may hold: its usable cache, or the given capacity.
      weight_bytes: bytes of all layers' weights, shared weights counted once.
      resident_bytes: num_devices * usable_bytes.
      num_devices: number of devices.
      devices_needed: width in bits -> devices that hold all weights at that width. Contains the
        weights' own width and the common ones.
      largest_layer: name of the layer with the most weights.
      largest_layer_bytes: bytes of its weights.
      tensor_ways: width in bits -> devices over which that layer must be split to fit.
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
        """True if the weights, without activations, fit the caches layer by layer."""
        return (
            self.resident_bytes >= self.weight_bytes
            and self.largest_layer_bytes <= self.usable_bytes
        )

    @property
    def ways_to_fit(self) -> str:
        """Sentence without a full stop: devices, bits and tensor ways under which weights fit."""
        bits, devices = next(iter(self.devices_needed.items()))
        narrower = [
            f"{count:,} at {NAMES[width]}"
            for width, count in self.devices_needed.items()
            if width != bits and count < devices
        ]
        less = f" ({', '.join(narrower)})" if narrower else ""
        ways = self.tensor_ways[bits]
        split = f", with '{self.largest_layer}' split over {ways} tensor ways" if ways > 1 else ""
        return (
            f"All weights fit the caches of {devices:,} {plural(devices, 'device')} at "
            f"{NAMES[bits]}{less}{split}"
        )

    def __str__(self) -> str:
        needed = ", ".join(
            f"{count:,} at {NAMES[bits]}" for bits, count in self.devices_needed.items()
        )
        ways = ", ".join(f"{count} at {NAMES[bits]}" for bits, count in self.tensor_ways.items())
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
    """Applies the capacity law: resident parameters = devices x usable bytes x 8 / bits.

    Args:
      costs: cost of each layer, at least one.
      device: kind of device.
      num_devices: number of devices.
      bits: width of the weights that `costs` count.
      capacity: bytes that a device may hold; None for its usable cache.
      weight_bytes: bytes of all layers' weights, shared weights counted once; None if layers share
        no weights.
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
    """The fewest equal chunks of rows whose activations and buffers fit beside a layer's weights.

    None if the weights do not fit by themselves.
    """
    free = capacity - cost.weight_bytes
    return None if free <= 0 else max(1, -(-(cost.activation_bytes + cost.buffer_bytes) // free))


def residency(
    groups: Sequence[Sequence[LayerCost]],
    device: DeviceSpec,
    bound: CapacityBound,
    stages_per_device: int = 1,
) -> str:
    """Sentences on the stages that exceed the usable L2, and ways to make them fit; "" if none do.

    Args:
      groups: layers of each stage.
      device: kind of device.
      bound: capacity law of the model on these devices.
      stages_per_device: stages that share a device's cache.
    """
    usable = device.usable_l2_bytes // stages_per_device
    sizes = [sum(cost.size for cost in group) for group in groups]
    beyond = [s for s, size in enumerate(sizes) if size > usable]
    if not beyond:
        return ""
    largest = max(beyond, key=lambda s: sizes[s])
    smaller = "" if bound.is_resident is False else " Or use more microbatches."
    return (
        f"Not resident in cache: {len(beyond)} of {len(groups)} "
        f"{plural(len(groups), 'stage')} {'exceeds' if len(beyond) == 1 else 'exceed'} the usable "
        f"L2 of {device.name}, {bytes_text(usable)} a stage (stage {largest} has "
        f"{bytes_text(sizes[largest])}). Weights beyond it stream from memory every tick. "
        f"{bound.ways_to_fit}.{smaller}"
    )


def streaming_notes(groups: Sequence[Sequence[LayerCost]], device: DeviceSpec) -> list[str]:
    """One sentence for each stage that exceeds the cache: bytes streamed a tick, and their time.

    Args:
      groups: the layers of each stage.
      device: kind of device.
    """
    notes: list[str] = []
    for s, group in enumerate(groups):
        excess = sum(cost.size for cost in group) - device.usable_l2_bytes
        if excess > 0:
            microseconds = excess / device.memory_bandwidth * 1e6
            notes.append(
                f"stage {s} exceeds the cache by {excess:,} bytes, which stream from memory every "
                f"tick: {microseconds:,.1f} us at {device.memory_bandwidth / 1e12:.2f} TB/s"
            )
    return notes
