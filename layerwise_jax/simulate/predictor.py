"""What a step takes under every strategy: seconds, bytes, and what bounds it, from plain numbers.

    work = dense_decode()                                          # the 16-layer dense model
    prediction = predict(work, Strategy("layer-wise", stage=16), H100)
    prediction.tokens_per_second, prediction.bound_by

Behind it, in the order in which they are used:

    simulate_work         what a step has to do
    simulate_calibration  how far real programs stay behind the device's figures
    simulate_strategy     how a step is spread over devices
    simulate_stage        one stage and one group of examples
    simulate_training     forward and backward by a schedule
    simulate_prediction   what comes out
    simulate_records      measurements
    simulate_fit          a calibration from measurements

All links are taken to be alike, as within one host. What the optimiser does after a training step
is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from layerwise_jax.cost.device import DeviceSpec
from layerwise_jax.partition.solver import solve
from layerwise_jax.simulate.calibration import STOCK, Calibration
from layerwise_jax.simulate.prediction import Prediction
from layerwise_jax.simulate.stage import Parts, StagePass, ring_all_reduce_bytes
from layerwise_jax.simulate.strategy import Strategy, group_counts, shapes, strategy_of
from layerwise_jax.simulate.training import (
    BACKWARD_PASSES,
    accumulator_bytes,
    training_parts,
    training_stash,
)
from layerwise_jax.simulate.work import LayerWork, StepWork, dense_decode, dense_prefill

__all__ = [
    "STOCK",
    "Calibration",
    "LayerWork",
    "Prediction",
    "StepWork",
    "Strategy",
    "best_strategies",
    "dense_decode",
    "dense_prefill",
    "ideal_per_second",
    "predict",
]


def predict(
    work: StepWork, strategy: Strategy, device: DeviceSpec, calibration: Calibration = STOCK
) -> Prediction:
    """What a step takes.

    Decoding is a ring: a step has as many ticks as there are groups, or stages if those are more. A
    forward pass has M + k - 1 ticks for M groups and k stages. Training runs 1F1B in step. In a
    tick every stage does one group, the slowest sets the pace, and its messages follow; weights are
    read once a tick.

    Args:
      work: what is to be done.
      strategy: how it is spread.
      device: one of the devices, all alike.
      calibration: how far programs stay behind the device's figures.

    Raises:
      ValueError: there are more stages than layers.
    """
    return _Simulation(work, strategy, device, calibration).prediction()


def best_strategies(
    work: StepWork, num_devices: int, device: DeviceSpec, calibration: Calibration = STOCK
) -> list[Prediction]:
    """A prediction for every shape of `num_devices`, and for one device: each with its best number
    of groups.
    """
    found = []
    for data, stage, tensor in shapes(work, num_devices):
        candidates = [
            predict(work, strategy_of(data, stage, tensor, groups=m), device, calibration)
            for m in group_counts(work, data, stage)
        ]
        found.append(min(candidates, key=lambda each: (not each.fits_memory, each.step_seconds)))
    return found


def ideal_per_second(work: StepWork, device: DeviceSpec, num_devices: int) -> float:
    """Tokens a second if all devices together read weights and caches from memory once a step, and
    nothing else.
    """
    num_bytes = work.read_bytes + work.state_bytes
    return work.batch * work.tokens * num_devices * device.memory_bandwidth / num_bytes


@dataclass(frozen=True)
class _Simulation:
    work: StepWork
    strategy: Strategy
    device: DeviceSpec
    calibration: Calibration

    def prediction(self) -> Prediction:
        work, strategy, parts = self.work, self.strategy, self.step_parts
        passes = 1 + BACKWARD_PASSES if work.kind == "training" else 1
        return Prediction(
            work=work,
            strategy=strategy,
            device=self.device.name,
            step_seconds=parts.seconds,
            seconds_by_part=parts,
            lower_bound_seconds=passes
            * self.num_ticks
            * max(each.floor_seconds() for each in self.passes),
            num_ticks=self.num_ticks,
            weight_bytes=max(each.weight_bytes + self.accumulators(each) for each in self.passes),
            state_bytes=self.num_groups * max(each.state_bytes for each in self.passes),
            activation_bytes=self.activation_bytes,
            memory_bytes=self.device.memory_bytes,
            link_bytes=self.link_bytes,
            collectives=self.collectives,
            is_resident=all(each.is_resident for each in self.passes),
        )

    @property
    def num_groups(self) -> int:
        return self.strategy.num_groups(self.work.batch)

    @property
    def num_ticks(self) -> int:
        """Ticks of one pass over all groups."""
        if self.work.kind == "decode":
            return max(self.num_groups, self.strategy.stage)
        return self.num_groups + self.strategy.stage - 1

    @cached_property
    def passes(self) -> list[StagePass]:
        size = self.strategy.group_size(self.work.batch)
        layers = self.work.layers
        return [
            StagePass(layers[start:stop], size, self.strategy.tensor, self.device, self.work.dtype)
            for start, stop in pairwise(_boundaries(self.work, self.strategy, self.device))
        ]

    @cached_property
    def step_parts(self) -> Parts:
        """The slowest stage's pass with its messages, as often as there are ticks."""
        by_stage = [each.parts(self.calibration) for each in self.passes]
        pace = max(by_stage, key=lambda parts: parts.seconds)
        if self.work.kind != "training":
            return (pace + self.tick_parts) * self.num_ticks
        stages = training_parts(by_stage, self.tick_parts, self.num_groups)
        return stages + self.gradient_parts

    @property
    def tick_parts(self) -> Parts:
        """What a tick takes besides its stage."""
        turn = Parts(latency=self.calibration.tick_seconds)
        if self.strategy.stage == 1:
            return turn
        permute = self.calibration.permute_seconds
        latency = self.device.link_latency if permute is None else permute
        return turn + Parts(
            links=max(self.sent_bytes) / self.device.link_bandwidth, latency=latency
        )

    @property
    def sent_bytes(self) -> list[float]:
        """Bytes of one group over each boundary."""
        return [each.examples * each.layers[-1].send_bytes for each in self.passes[:-1]]

    @property
    def gradient_parts(self) -> Parts:
        """Summing the gradients of replicas."""
        if self.strategy.data == 1:
            return Parts()
        latency = self.calibration.all_reduce_seconds
        return Parts(links=self.gradient_bytes / self.device.link_bandwidth, latency=latency)

    @property
    def gradient_bytes(self) -> float:
        """Bytes of gradients that the device with most weights sends."""
        return ring_all_reduce_bytes(
            max(self.accumulators(each) for each in self.passes), self.strategy.data
        )

    def accumulators(self, stage: StagePass) -> float:
        """Bytes of the gradients that a device adds up."""
        return (
            accumulator_bytes(stage.weight_bytes, self.work.weight_item_bytes)
            if self.work.kind == "training"
            else 0.0
        )

    @property
    def activation_bytes(self) -> float:
        """On the device with most: a layer's; in training a stage's, for its vjp, and what waits
        for its backward.
        """
        if self.work.kind != "training":
            return max(each.activation_bytes for each in self.passes)
        alive = max(each.all_activation_bytes for each in self.passes)
        return alive + training_stash([*self.sent_bytes, 0.0], self.num_groups)

    @property
    def directions(self) -> int:
        """How often a message goes: in training there are gradients too."""
        return 2 if self.work.kind == "training" else 1

    @property
    def link_bytes(self) -> float:
        ways, groups = self.strategy.tensor, self.num_groups
        boundaries = sum(self.sent_bytes) * ways
        tensor = ways * ring_all_reduce_bytes(sum(each.summed_bytes for each in self.passes), ways)
        gradients = 0.0
        if self.work.kind == "training":
            total = sum(self.accumulators(each) for each in self.passes)
            gradients = self.strategy.tensor * ring_all_reduce_bytes(total, self.strategy.data)
        return self.strategy.data * (self.directions * groups * (boundaries + tensor) + gradients)

    @property
    def collectives(self) -> int:
        """One permute a tick, the all-reduces of a stage in each, and one for gradients."""
        a_tick = (self.strategy.stage > 1) + max(each.all_reduces for each in self.passes)
        gradients = self.work.kind == "training" and self.strategy.data > 1
        return self.directions * self.num_ticks * a_tick + gradients


def _boundaries(work: StepWork, strategy: Strategy, device: DeviceSpec) -> Sequence[int]:
    """Where the stages are cut: evenly if all layers are alike, else so that the slowest is as fast
    as can be.
    """
    count, stages = len(work.layers), strategy.stage
    if stages > count:
        raise ValueError(
            f"{stages} stages want as many layers; there are {count}. Use fewer stages and more "
            "replicas."
        )
    if work.is_uniform or stages in (1, count):
        return [count * s // stages for s in range(stages + 1)]
    size, ways = strategy.group_size(work.batch), strategy.tensor
    seconds = [
        StagePass([layer], size, ways, device, work.dtype).parts(STOCK).seconds
        for layer in work.layers
    ]
    return solve(seconds, None, max_stages=stages, exactly=True).boundaries
