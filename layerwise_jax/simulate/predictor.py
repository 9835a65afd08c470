"""Predictor: seconds, bytes and bottleneck of a step under a strategy, from plain numbers.

    work = dense_decode()                                          # the 16-layer dense model
    prediction = predict(work, Strategy("layer-wise", stage=16), H100)
    prediction.tokens_per_second, prediction.bound_by

The modules of this folder in the order of use:

    work         bytes and FLOPs of a step
    calibration  efficiency factors
    strategy     meshes of devices
    stage        one stage and one group of examples
    training     forward and backward by a schedule
    prediction   the result
    records      measurements
    fit          a calibration from measurements

All links are equal, as within one host. The optimizer's update is not included.
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
    """Predicts time and memory of a step under a strategy.

    Decoding is a ring whose steps have max(groups, stages) ticks. A forward pass has M + k - 1
    ticks for M groups and k stages. Training runs 1F1B in lockstep. In a tick every stage processes
    one group and reads its weights once; the slowest stage and then its messages set the pace.

    Args:
      work: the step.
      strategy: mesh and groups.
      device: kind of device.
      calibration: efficiency factors.

    Raises:
      ValueError: there are more stages than layers.
    """
    return _Simulation(work, strategy, device, calibration).prediction()


def best_strategies(
    work: StepWork, num_devices: int, device: DeviceSpec, calibration: Calibration = STOCK
) -> list[Prediction]:
    """A prediction for one device and for each mesh of `num_devices`, with its best group count."""
    found: list[Prediction] = []
    for data, stage, tensor in shapes(work, num_devices):
        candidates = [
            predict(work, strategy_of(data, stage, tensor, groups=m), device, calibration)
            for m in group_counts(work, data, stage)
        ]
        found.append(min(candidates, key=lambda each: (not each.fits_memory, each.step_seconds)))
    return found


def ideal_per_second(work: StepWork, device: DeviceSpec, num_devices: int) -> float:
    """Tokens a second if all devices together read weights and caches once a step, without any
    other time.
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
        work = self.work
        strategy = self.strategy
        parts = self.step_parts
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
        """Time of a step: every tick takes the slowest stage's pass and the messages.

        In training, forward and backward ticks and the all-reduce of gradients.
        """
        by_stage = [each.parts(self.calibration) for each in self.passes]
        pace = max(by_stage, key=lambda parts: parts.seconds)
        if self.work.kind != "training":
            return (pace + self.tick_parts) * self.num_ticks
        stages = training_parts(by_stage, self.tick_parts, self.num_groups)
        return stages + self.gradient_parts

    @property
    def tick_parts(self) -> Parts:
        """Overhead of a tick: the loop's iteration and the largest message."""
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
        """Time of the all-reduce of gradients over replicas."""
        if self.strategy.data == 1:
            return Parts()
        latency = self.calibration.all_reduce_seconds
        return Parts(links=self.gradient_bytes / self.device.link_bandwidth, latency=latency)

    @property
    def gradient_bytes(self) -> float:
        """Bytes of gradients that the device with the most weights sends."""
        return ring_all_reduce_bytes(
            max(self.accumulators(each) for each in self.passes), self.strategy.data
        )

    def accumulators(self, stage: StagePass) -> float:
        """Bytes of a device's gradient accumulators; 0 without training."""
        return (
            accumulator_bytes(stage.weight_bytes, self.work.weight_item_bytes)
            if self.work.kind == "training"
            else 0.0
        )

    @property
    def activation_bytes(self) -> float:
        """Bytes on the fullest device: one layer's activations.

        In training, those of the whole stage for its backward, plus the stash.
        """
        if self.work.kind != "training":
            return max(each.activation_bytes for each in self.passes)
        alive = max(each.all_activation_bytes for each in self.passes)
        return alive + training_stash([*self.sent_bytes, 0.0], self.num_groups)

    @property
    def directions(self) -> int:
        """Messages of a group over a boundary: activations, and gradients in training."""
        return 2 if self.work.kind == "training" else 1

    @property
    def link_bytes(self) -> float:
        ways = self.strategy.tensor
        groups = self.num_groups
        boundaries = sum(self.sent_bytes) * ways
        tensor = ways * ring_all_reduce_bytes(sum(each.summed_bytes for each in self.passes), ways)
        gradients = 0.0
        if self.work.kind == "training":
            total = sum(self.accumulators(each) for each in self.passes)
            gradients = self.strategy.tensor * ring_all_reduce_bytes(total, self.strategy.data)
        return self.strategy.data * (self.directions * groups * (boundaries + tensor) + gradients)

    @property
    def collectives(self) -> int:
        """A step's collectives: a permute and all-reduces each tick, and one for gradients."""
        a_tick = (self.strategy.stage > 1) + max(each.all_reduces for each in self.passes)
        gradients = self.work.kind == "training" and self.strategy.data > 1
        return self.directions * self.num_ticks * a_tick + gradients


def _boundaries(work: StepWork, strategy: Strategy, device: DeviceSpec) -> Sequence[int]:
    """Boundaries of the stages: even for equal layers, else with the smallest bottleneck."""
    count = len(work.layers)
    stages = strategy.stage
    if stages > count:
        raise ValueError(
            f"stage must be at most the number of layers, {count}, got {stages}. Use fewer stages "
            "and more replicas."
        )
    if work.is_uniform or stages in (1, count):
        return [count * s // stages for s in range(stages + 1)]
    size = strategy.group_size(work.batch)
    ways = strategy.tensor
    seconds = [
        StagePass([layer], size, ways, device, work.dtype).parts(STOCK).seconds
        for layer in work.layers
    ]
    return solve(seconds, None, max_stages=stages, exactly=True).boundaries
