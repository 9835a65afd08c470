"""Time and stash of a training step: forward and backward of the stages by a schedule."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from layerwise_jax.schedule.registry import SCHEDULES
from layerwise_jax.schedule.timing import simulate_schedule
from layerwise_jax.simulate.stage import Parts

# Passes of a backward: two products for each of the forward's, and the recomputed forward
# (remat="stage").
BACKWARD_PASSES = 3
ACCUMULATOR_BYTES = 4

# The schedule of training steps: one stage a device, its live microbatches by place.
SCHEDULE = SCHEDULES["1f1b"]


def training_parts(stages: Sequence[Parts], tick: Parts, num_microbatches: int) -> Parts:
    """Seconds of a 1F1B step in lockstep, in the proportions of the slowest stage and its messages.

    Args:
      stages: forward pass of each stage for one microbatch.
      tick: overhead of a tick.
      num_microbatches: microbatches of a step.
    """
    slowest = max(stages, key=lambda parts: parts.seconds)
    if len(stages) == 1:
        return (slowest * (1 + BACKWARD_PASSES) + tick) * num_microbatches
    forward = [parts.seconds for parts in stages]
    simulation = simulate_schedule(
        SCHEDULE.generate(len(stages), 1, num_microbatches, False),
        forward,
        [BACKWARD_PASSES * seconds for seconds in forward],
        link_seconds=tick.seconds,
        lockstep=True,
    )
    busy = (slowest * (1 + BACKWARD_PASSES) + tick * 2) * num_microbatches
    return busy * (simulation.makespan / busy.seconds)


def training_stash(received: Sequence[float], num_microbatches: int) -> float:
    """Bytes of the fullest device's stash under 1F1B: arrived activations kept for the backward.

    Args:
      received: bytes of one microbatch that cross the boundary after each stage; 0 after the last.
      num_microbatches: microbatches of a step.
    """
    assert SCHEDULE.in_flight is not None
    places = np.arange(len(received))[::-1]  # from the first stage to the last
    arriving = np.array([0.0, *received[:-1]])
    return float((SCHEDULE.in_flight(places, num_microbatches) * arriving).max())


def accumulator_bytes(weight_bytes: float, item_bytes: int) -> float:
    """Bytes of gradient accumulators, which are float32 or as wide as the weights."""
    return weight_bytes / item_bytes * max(ACCUMULATOR_BYTES, item_bytes)
