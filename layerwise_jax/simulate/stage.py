"""What one stage takes for one group of examples, by what it waits for, and the traffic that no
program avoids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from layerwise_jax.cost.device import DeviceSpec
from layerwise_jax.simulate.calibration import Calibration
from layerwise_jax.simulate.work import LayerWork


@dataclass(frozen=True)
class Parts:
    """Seconds, by what they are spent on; they add up, since kernels run one after the other.

    Attributes:
      memory: reading weights, activations and cache from memory.
      cache: reading what is resident.
      arithmetic: computing, where that takes longer than reading.
      links: bytes between devices.
      latency: launches, turns of the loop, and the links' latencies.
    """

    memory: float = 0.0
    cache: float = 0.0
    arithmetic: float = 0.0
    links: float = 0.0
    latency: float = 0.0

    @property
    def seconds(self) -> float:
        return sum(getattr(self, each.name) for each in fields(self))

    @property
    def largest(self) -> str:
        """The name of the part that takes longest."""
        return max((each.name for each in fields(self)), key=lambda name: getattr(self, name))

    def __add__(self, other: Parts) -> Parts:
        return Parts(
            *(getattr(self, each.name) + getattr(other, each.name) for each in fields(self))
        )

    def __mul__(self, times: float) -> Parts:
        return Parts(*(times * getattr(self, each.name) for each in fields(self)))


@dataclass(frozen=True)
class StagePass:
    """One stage working on one group.

    Attributes:
      layers: its layers.
      examples: of the group.
      ways: tensor ways that each layer is split.
      device: the device.
      dtype: of the products.
    """

    layers: Sequence[LayerWork]
    examples: int
    ways: int
    device: DeviceSpec
    dtype: str

    @property
    def weight_bytes(self) -> float:
        """On one device."""
        return sum(layer.weight_bytes for layer in self.layers) / self.ways

    @property
    def read_bytes(self) -> float:
        """Of the weights on one device, what the pass reads."""
        return sum(layer.read_bytes for layer in self.layers) / self.ways

    @property
    def state_bytes(self) -> float:
        """On one device, of one group."""
        return self.examples * sum(layer.state_bytes for layer in self.layers) / self.ways

    @property
    def activation_bytes(self) -> float:
        """On one device: of the layer with most; workspace is used again by the next."""
        return self.examples * max(layer.activation_bytes for layer in self.layers) / self.ways

    @property
    def all_activation_bytes(self) -> float:
        """On one device: of all its layers, as a backward needs them."""
        return self.examples * sum(layer.activation_bytes for layer in self.layers) / self.ways

    @property
    def summed_bytes(self) -> float:
        """That all-reduces of the pass add up, on every tensor way."""
        return self.examples * sum(layer.all_reduces * layer.send_bytes for layer in self.layers)

    @property
    def all_reduces(self) -> int:
        """Of the pass."""
        return sum(layer.all_reduces for layer in self.layers) if self.ways > 1 else 0

    @property
    def could_be_resident(self) -> bool:
        """Whether weights and activations fit the usable cache."""
        return self.read_bytes + self.activation_bytes <= self.device.usable_l2_bytes

    @property
    def is_resident(self) -> bool:
        """Whether the weights are still in the cache when they are next used.

        A key-value cache is streamed through the same L2 in between, and nothing pins the weights:
        so all of it has to fit.
        """
        return (
            self.read_bytes + self.activation_bytes + self.state_bytes
            <= self.device.usable_l2_bytes
        )

    def floor_seconds(self) -> float:
        """The longer of computing at the device's rate and of reading weights and caches once,
        weights resident if they could be.
        """
        device = self.device
        bandwidth = device.l2_bandwidth if self.could_be_resident else device.memory_bandwidth
        reading = self.read_bytes / bandwidth + self.state_bytes / device.memory_bandwidth
        flops = self.examples * sum(layer.flops for layer in self.layers) / self.ways
        return max(reading, flops / device.rate(self.dtype))

    def parts(self, calibration: Calibration) -> Parts:
        """Seconds of the pass, without what it sends to other stages."""
        total, resident = Parts(), self.is_resident
        for layer in self.layers:
            total += self._products(layer, calibration, resident) + self._rest(layer, calibration)
        return total

    def _products(self, layer: LayerWork, calibration: Calibration, resident: bool) -> Parts:
        """The roofline of a layer's products: the longer of computing and of reading weights and
        activations.
        """
        device = self.device
        bandwidth = device.memory_bandwidth * calibration.weight_share
        if resident:
            bandwidth = max(bandwidth, device.l2_bandwidth * calibration.cache_share)
        moved = (layer.read_bytes + self.examples * layer.activation_bytes) / self.ways
        reading = moved / bandwidth
        rate = device.rate(self.dtype) * calibration.arithmetic_share
        computing = self.examples * layer.flops / self.ways / rate
        if computing > reading:
            return Parts(arithmetic=computing)
        return Parts(cache=reading) if resident else Parts(memory=reading)

    def _rest(self, layer: LayerWork, calibration: Calibration) -> Parts:
        """A layer's own cache, its launches, and the sums over tensor ways."""
        state = self.examples * layer.state_bytes / self.ways
        kernels = calibration.kernels_per_layer if layer.kernels is None else layer.kernels
        launches = kernels * calibration.kernel_seconds
        rows = calibration.row_seconds * self.examples / self.ways
        sums, sending = 0.0, 0.0
        if self.ways > 1:
            sums = layer.all_reduces * calibration.all_reduce_seconds
            sent = ring_all_reduce_bytes(self.examples * layer.send_bytes, self.ways)
            sending = layer.all_reduces * sent / self.device.link_bandwidth
        return Parts(
            memory=state / (self.device.memory_bandwidth * calibration.state_share),
            links=sending,
            latency=launches + rows + sums,
        )


def ring_all_reduce_bytes(num_bytes: float, ways: int) -> float:
    """Bytes that each of `ways` devices sends to add up `num_bytes`: 2 (w - 1) / w of them, which
    no algorithm beats.

    Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms, 2009. What a one-shot algorithm
    saves is latency, which `Calibration.all_reduce_seconds` has as measured.
    """
    return 2 * (ways - 1) / ways * num_bytes
