"""Forward and backward of stages by a schedule: what a training step takes, and what it keeps
meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence

from layerwise_jax.schedule.generators import one_f_one_b
from layerwise_jax.schedule.timing import simulate_schedule
from layerwise_jax.simulate.stage import Parts

# Backward has two products for each of forward's, and runs forward again from what arrived
# (remat="stage").
BACKWARD_PASSES = 3
ACCUMULATOR_BYTES = 4


def training_parts(stages: Sequence[Parts], tick: Parts, num_microbatches: int) -> Parts:
    """Seconds of a step of 1F1B, all stages in step, split in the proportions of the slowest stage
    and its messages.

    Args:
      stages: a forward pass of each stage for one microbatch.
      tick: what a tick takes on top.
      num_microbatches: microbatches.
    """
    slowest = max(stages, key=lambda parts: parts.seconds)
    if len(stages) == 1:
        return (slowest * (1 + BACKWARD_PASSES) + tick) * num_microbatches
    forward = [parts.seconds for parts in stages]
    simulation = simulate_schedule(
        one_f_one_b(len(stages), num_microbatches),
        forward,
        [BACKWARD_PASSES * seconds for seconds in forward],
        link_seconds=tick.seconds,
        lockstep=True,
    )
    busy = (slowest * (1 + BACKWARD_PASSES) + tick * 2) * num_microbatches
    return busy * (simulation.makespan / busy.seconds)


def training_stash(received: Sequence[float], num_microbatches: int) -> float:
    """Bytes that a device keeps of the microbatches in flight: what arrived at a stage, until its
    backward.

    Under 1F1B stage s of k has k - s microbatches in flight, or all of them if there are fewer.

    Args:
      received: bytes of one microbatch that cross each boundary after a stage; 0 after the last.
      num_microbatches: microbatches.
    """
    k = len(received)
    arriving = [0.0, *received[:-1]]
    return max(min(k - s, num_microbatches) * arriving[s] for s in range(k))


def accumulator_bytes(weight_bytes: float, item_bytes: int) -> float:
    """Bytes of the sums of gradients of weights of `item_bytes` each: they are kept in float32 or
    wider.
    """
    return weight_bytes / item_bytes * max(ACCUMULATOR_BYTES, item_bytes)
