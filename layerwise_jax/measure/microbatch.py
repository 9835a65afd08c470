"""How large a microbatch should be: as large as the stages' cache allows, and small enough to fill
the pipeline.
"""

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

# With four microbatches for each stage but one, a fifth of the ticks is bubble.
FULL_PER_STAGE = 4

# The costs of a layer that grow with the microbatch. XLA's sizes are affine in it, to within a
# tenth of a percent.
GROWING = ("activation_bytes", "buffer_bytes", "flops", "bytes_accessed", "peak_bytes")


@dataclass(frozen=True, eq=False)
class Staging:
    """A number of microbatches, with the layers at that size, what they cost, and where they are
    cut.

    `stage_bytes` is what each stage holds at its peak, compiled as one program; None where that was
    not asked for.
    """

    num_microbatches: int
    layers: LayerSequence
    gauge: CompiledCosts
    costs: tuple[LayerCost, ...]
    partition: Partition
    stage_bytes: tuple[int, ...] | None


@dataclass(frozen=True, eq=False)
class StagingChoices:
    """What a staging is chosen for.

    Attributes:
      trace: traces the function with microbatches of a number of examples.
      num_examples: examples on each replica.
      num_stages: stages.
      device: the device to compile for, and whose speeds count.
      capacity: bytes of a stage, or None.
      method: "dp" or "greedy".
      stages_per_device: stages that share a device.
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
        """The staging with so many microbatches, its layers compiled at that size.

        Under a capacity its stages are compiled too; if one holds more than its layers promised and
        does not fit, the layers are cut again, by compiled sizes.

        Raises:
          CapacityError: it does not fit.
        """
        gauge = self.gauge(num_microbatches)
        costs = gauge.costs()
        partition = self.cut(gauge.layers, costs)
        if self.capacity is None:
            return Staging(num_microbatches, gauge.layers, gauge, costs, partition, None)
        large = [run for run in partition.stages if gauge.stage_bytes(*run) > self.capacity]
        if large and self.method == "greedy":
            raise CapacityError(
                f"Layers {large[0][0]}..{large[0][1] - 1}, which greedy aggregation makes a "
                "stage, hold "
                f"{gauge.stage_bytes(*large[0]):,} bytes once compiled, more than the capacity of "
                f"{self.capacity:,}. "
                "Greedy aggregation goes by the layers' own sizes; method='dp' cuts again by "
                "compiled sizes.",
                layers=large[0],
                needed_bytes=gauge.stage_bytes(*large[0]),
                capacity=self.capacity,
            )
        if large:
            partition = self.cut(gauge.layers, costs, measure=gauge.stage_bytes)
        sizes = tuple(gauge.stage_bytes(a, b) for a, b in partition.stages)
        return Staging(num_microbatches, gauge.layers, gauge, costs, partition, sizes)

    def gauge(self, num_microbatches: int) -> CompiledCosts:
        """The gauge of the layers at that size; the same one each time, so that nothing is compiled
        twice.
        """
        if num_microbatches not in self._gauges:
            layers = self.trace(self.num_examples // num_microbatches)
            self._gauges[num_microbatches] = CompiledCosts(layers, self.device)
        return self._gauges[num_microbatches]

    def cut(
        self, layers: LayerSequence, costs: Sequence[LayerCost], scale: float = 1.0, **options: Any
    ) -> Partition:
        """The best partition of layers with these costs; `scale` times the bytes that the layers
        send.
        """
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
        """Numbers of microbatches in order of preference: the fewest that fill the pipeline first,
        then the fuller.
        """
        divisors = [m for m in range(1, self.num_examples + 1) if self.num_examples % m == 0]
        full = FULL_PER_STAGE * (self.num_stages - 1)
        return [m for m in divisors if m >= full] + [m for m in reversed(divisors) if m < full]


def choose_staging(choices: StagingChoices) -> Staging:
    """The largest microbatch that fits among those that fill the pipeline.

    The preferred size is compiled first. If it does not fit, single examples are compiled too,
    costs in between are taken to be affine, and the sizes that are predicted to fit are compiled
    until one does.

    Raises:
      CapacityError: nothing fits, not even one example at a time.
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
    """The cost of a layer between two measured microbatches: `share` is 0 at the small one, 1 at
    the large.

    Beyond the large one workspace that shrank in between would fall below nothing, and is taken to
    be none.
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
    """What layers take on a device, and what crossing each boundary takes.

    A layer takes the longer of its arithmetic and of reading what it holds: from the cache, or from
    memory if it alone is more than the cache keeps. A boundary takes its bytes over the link's
    bandwidth. The link's latency is left out: the loop pays it once a tick, wherever the cuts are.

    Returns:
      Seconds of n layers; seconds of n + 1 boundaries, zero at both ends.
    """
    dtype = str(max(layers.signature.params_avals, key=nbytes).dtype)
    seconds = [
        device.seconds(cost.flops, cost.size, dtype, resident=cost.size <= device.usable_l2_bytes)
        for cost in costs
    ]
    inner = [scale * sent / device.link_bandwidth for sent in layers.boundary_bytes[1:-1]]
    return seconds, [0.0, *inner, 0.0]
