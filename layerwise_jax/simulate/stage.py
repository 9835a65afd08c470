"""Time of one stage for one group of examples, broken down by bottleneck, and its lower bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from layerwise_jax.cost.device import DeviceSpec
from layerwise_jax.simulate.calibration import Calibration
from layerwise_jax.simulate.work import LayerWork


@dataclass(frozen=True)
class Parts:
    """Seconds by bottleneck. They add up, since kernels run one after the other.

    Attributes:
      memory: reads of weights, activations and key-value caches from memory.
      cache: reads of resident weights.
      arithmetic: products in which arithmetic takes longer than reads.
      links: bytes sent between devices.
      latency: launches, loop iterations, and latencies of links.
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
        """Name of the largest part."""
        return max((each.name for each in fields(self)), key=lambda name: getattr(self, name))

    def __add__(self, other: Parts) -> Parts:
        return Parts(
            *(getattr(self, each.name) + getattr(other, each.name) for each in fields(self))
        )

    def __mul__(self, times: float) -> Parts:
        return Parts(*(times * getattr(self, each.name) for each in fields(self)))


@dataclass(frozen=True)
class StagePass:
    """One pass of one stage over one group of examples.

    Attributes:
      layers: layers of the stage.
      examples: examples of the group.
      ways: tensor ways: devices over which each layer is split.
      device: kind of device.
      dtype: dtype of the products.
    """

    layers: Sequence[LayerWork]
    examples: int
    ways: int
    device: DeviceSpec
    dtype: str

    @property
    def weight_bytes(self) -> float:
        """Bytes of weights on one device."""
        return sum(layer.weight_bytes for layer in self.layers) / self.ways

    @property
    def read_bytes(self) -> float:
        """Bytes of weights on one device that the pass reads."""
        return sum(layer.read_bytes for layer in self.layers) / self.ways

    @property
    def state_bytes(self) -> float:
        """Bytes of the group's key-value caches on one device."""
        return self.examples * sum(layer.state_bytes for layer in self.layers) / self.ways

    @property
    def activation_bytes(self) -> float:
        """Bytes on one device of the largest layer's activations; layers share workspace."""
        return self.examples * max(layer.activation_bytes for layer in self.layers) / self.ways

    @property
    def all_activation_bytes(self) -> float:
        """Bytes on one device of all layers' activations, which a backward needs."""
        return self.examples * sum(layer.activation_bytes for layer in self.layers) / self.ways

    @property
    def summed_bytes(self) -> float:
        """Bytes that the pass's all-reduces sum, on each tensor way."""
        return self.examples * sum(layer.all_reduces * layer.send_bytes for layer in self.layers)

    @property
    def all_reduces(self) -> int:
        """Number of all-reduces of the pass."""
        return sum(layer.all_reduces for layer in self.layers) if self.ways > 1 else 0

    @property
    def could_be_resident(self) -> bool:
        """True if weights and activations fit the usable cache."""
        return self.read_bytes + self.activation_bytes <= self.device.usable_l2_bytes

    @property
    def is_resident(self) -> bool:
        """True if the weights are still in the cache at the next pass.

        The key-value cache streams through the same L2 and nothing pins the weights, so weights,
        activations and key-value cache must all fit.
        """
        return (
            self.read_bytes + self.activation_bytes + self.state_bytes
            <= self.device.usable_l2_bytes
        )

    def floor_seconds(self) -> float:
        """Lower bound on the pass: the longer of arithmetic and of one read of weights and caches.

        Weights are read from the cache if they could be resident.
        """
        device = self.device
        bandwidth = device.l2_bandwidth if self.could_be_resident else device.memory_bandwidth
        reading = self.read_bytes / bandwidth + self.state_bytes / device.memory_bandwidth
        flops = self.examples * sum(layer.flops for layer in self.layers) / self.ways
        return max(reading, flops / device.rate(self.dtype))

    def parts(self, calibration: Calibration) -> Parts:
        """Seconds of the pass without its messages to other stages."""
        total = Parts()
        resident = self.is_resident
        for layer in self.layers:
            total += self._products(layer, calibration, resident) + self._rest(layer, calibration)
        return total

    def _products(self, layer: LayerWork, calibration: Calibration, resident: bool) -> Parts:
        """Roofline of a layer's products: the longer of arithmetic and of reads."""
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
        """Reads of a layer's key-value cache, its launches, and its all-reduces."""
        state = self.examples * layer.state_bytes / self.ways
        kernels = calibration.kernels_per_layer if layer.kernels is None else layer.kernels
        launches = kernels * calibration.kernel_seconds
        rows = calibration.row_seconds * self.examples / self.ways
        sums = 0.0
        sending = 0.0
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
    """Bytes that each of `ways` devices sends in an all-reduce of `num_bytes`: 2 (w - 1) / w.

    That is the optimum (Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms, 2009). A
    one-shot algorithm saves latency only, which `Calibration.all_reduce_seconds` measures.
    """
    return 2 * (ways - 1) / ways * num_bytes
