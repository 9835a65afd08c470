"""Microbatch size: the largest whose stages fit the capacity and whose count fills the pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from layerwise_jax.cost.device import DeviceSpec
from layerwise_jax.cost.layer_cost import LayerCost
from layerwise_jax.measure.layers import CompiledCosts
from layerwise_jax.partition.solver import CapacityError, Partition, partition_layers
from layerwise_jax.trace.layers import LayerSequence
from layerwise_jax.trace.program import nbytes

# 4 (S - 1) microbatches in S stages: (S - 1) of 5 (S - 1) ticks, a fifth, are bubble.
FULL_PER_STAGE = 4

# Costs of a layer that grow with the microbatch. XLA's sizes are affine in it to within 0.1 %.
GROWING = ("activation_bytes", "buffer_bytes", "flops", "bytes_accessed", "peak_bytes")


@dataclass(frozen=True, eq=False)
class Staging:
    """Staging with a given number of microbatches.

    Attributes:
      num_microbatches: number of microbatches.
      layers: layers traced at that microbatch.
      gauge: compiled costs of these layers.
      costs: cost of every layer.
      partition: cut of the layers into stages.
      stage_bytes: peak bytes of every stage compiled as one program; None without a capacity.
    """

    num_microbatches: int
    layers: LayerSequence
    gauge: CompiledCosts
    costs: tuple[LayerCost, ...]
    partition: Partition
    stage_bytes: tuple[int, ...] | None


@dataclass(frozen=True, eq=False)
class StagingChoices:
    """Constraints under which a staging is chosen.

    Attributes:
      trace: function from examples per microbatch to the traced layers.
      num_examples: examples on each replica.
      num_stages: number of stages.
      device: device to compile for; its speeds balance the stages.
      capacity: most bytes of a stage, or None.
      method: "dp" or "greedy".
      stages_per_device: number of stages that share a device.
    """

    trace: Callable[[int], LayerSequence]
    num_examples: int
    num_stages: int
    device: DeviceSpec
    capacity: int | None
    method: str
    stages_per_device: int = 1
    _gauges: dict[int, CompiledCosts] = field(default_factory=dict, repr=False)

    def measured(self, num_microbatches: int) -> Staging:
        """Staging with this number of microbatches, from layers compiled at that size.

        Under a capacity the stages are compiled too. If a compiled stage exceeds the capacity, the
        layers are cut again by compiled sizes.

        Raises:
          CapacityError: no cut fits.
        """
        gauge = self.gauge(num_microbatches)
        costs = gauge.costs()
        partition = self.cut(gauge.layers, costs)
        if self.capacity is None:
            return Staging(num_microbatches, gauge.layers, gauge, costs, partition, None)
        large = [run for run in partition.stages if gauge.stage_bytes(*run) > self.capacity]
        if large and self.method == "greedy":
            raise CapacityError(
                f"capacity must hold every compiled stage, got {self.capacity:,} bytes for "
                f"layers {large[0][0]}..{large[0][1] - 1} of "
                f"{gauge.stage_bytes(*large[0]):,} bytes. Pass method='dp', which cuts again by "
                "compiled sizes; greedy aggregation uses the sizes of single layers.",
                layers=large[0],
                needed_bytes=gauge.stage_bytes(*large[0]),
                capacity=self.capacity,
            )
        if large:
            partition = self.cut(gauge.layers, costs, measure=gauge.stage_bytes)
        sizes = tuple(gauge.stage_bytes(a, b) for a, b in partition.stages)
        return Staging(num_microbatches, gauge.layers, gauge, costs, partition, sizes)

    def gauge(self, num_microbatches: int) -> CompiledCosts:
        """Compiled costs at this number of microbatches, cached."""
        if num_microbatches not in self._gauges:
            layers = self.trace(self.num_examples // num_microbatches)
            self._gauges[num_microbatches] = CompiledCosts(layers, self.device)
        return self._gauges[num_microbatches]

    def cut(
        self, layers: LayerSequence, costs: Sequence[LayerCost], scale: float = 1.0, **options: Any
    ) -> Partition:
        """Best partition of layers with these costs; bytes sent are multiplied by `scale`."""
        seconds, cut_seconds = roofline_seconds(layers, costs, self.device, scale)
        return partition_layers(
            costs,
            self.num_stages,
            self.capacity,
            self.method,
            seconds=seconds,
            cut_seconds=cut_seconds,
            **options,
        )

    def counts(self) -> list[int]:
        """Numbers of microbatches in order of preference.

        First those that fill the pipeline, fewest first; then the others, most first.
        """
        divisors = [m for m in range(1, self.num_examples + 1) if self.num_examples % m == 0]
        full = FULL_PER_STAGE * (self.num_stages - 1)
        return [m for m in divisors if m >= full] + [m for m in reversed(divisors) if m < full]


def choose_staging(choices: StagingChoices) -> Staging:
    """Staging with the largest microbatch that fits, among those that fill the pipeline.

    The preferred size is compiled first. If it does not fit, microbatches of one example are
    compiled too, costs in between are interpolated, and sizes predicted to fit are compiled until
    one fits.

    Raises:
      CapacityError: not even one example at a time fits.
    """
    first, *rest = choices.counts()
    try:
        return choices.measured(first)
    except CapacityError:
        large = choices.gauge(first)
        ends = (choices.gauge(choices.num_examples).costs(), large.costs())
    for count in rest:
        share = _share(choices.num_examples // count, choices.num_examples // first)
        costs = [between(a, b, share) for a, b in zip(*ends, strict=True)]
        try:
            choices.cut(large.layers, costs, scale=first / count)
            return choices.measured(count)
        except CapacityError:
            continue
    return choices.measured(choices.num_examples)


def between(small: LayerCost, large: LayerCost, share: float) -> LayerCost:
    """Cost of a layer interpolated between two microbatches: `share` 0 is the small, 1 the large.

    `share` may exceed 1. A cost that shrinks with the microbatch stops at 0.
    """
    grown: dict[str, Any] = {}
    for name in GROWING:
        low, high = getattr(small, name), getattr(large, name)
        grown[name] = max(type(low)(low + share * (high - low)), type(low)(0))
    return replace(small, **grown)


def _share(examples: int, largest: int) -> float:
    return (examples - 1) / (largest - 1) if largest > 1 else 0.0


def roofline_seconds(
    layers: LayerSequence, costs: Sequence[LayerCost], device: DeviceSpec, scale: float = 1.0
) -> tuple[list[float], list[float]]:
    """Roofline time of every layer, and transfer time of every boundary, in seconds.

    A layer takes the longer of its arithmetic and of reading its bytes: from L2 if the layer fits
    the usable L2, else from device memory. A boundary takes its bytes over the link's bandwidth.
    The link's latency is left out, since each tick pays it once for any cut.

    Returns:
      Seconds of n layers, and of n + 1 boundaries with 0 at both ends.
    """
    dtype = str(max(layers.signature.params_avals, key=nbytes).dtype)
    seconds = [
        device.seconds(cost.flops, cost.size, dtype, resident=cost.size <= device.usable_l2_bytes)
        for cost in costs
    ]
    inner = [scale * sent / device.link_bandwidth for sent in layers.boundary_bytes[1:-1]]
    return seconds, [0.0, *inner, 0.0]
