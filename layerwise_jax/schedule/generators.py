"""Generators of published schedules whose stages are placed round-robin.

Every action is at the earliest tick that its operands allow. All schedules run the backwards of a
stage in the order of the microbatches, so gradients accumulate in the same order under each.
"""

from __future__ import annotations

from itertools import pairwise

from layerwise_jax._arguments import checked_int
from layerwise_jax.schedule.streams import (
    alternate,
    delay_weight_gradients,
    lay_out,
    one_a_tick,
    passes,
)
from layerwise_jax.schedule.table import Action, Schedule


def forward_only(num_devices: int, num_microbatches: int, stages_per_device: int = 1) -> Schedule:
    """Forward passes only, with one stage a device in num_microbatches + num_devices - 1 ticks."""
    _check(num_devices, stages_per_device, num_microbatches)
    groups = _groups(num_microbatches, num_devices)
    return lay_out(
        [
            [one_a_tick(passes("F", stages, groups))]
            for stages in _stages(num_devices, stages_per_device)
        ]
    )


def gpipe(num_stages: int, num_microbatches: int) -> Schedule:
    """GPipe: all forwards, then all backwards (Huang et al. 2019, arXiv:1811.06965).

    One stage a device. Equal stages take (num_microbatches + num_stages - 1) (forward + backward)
    seconds, and all microbatches are alive at once.
    """
    checked_int("num_stages", num_stages)
    return looped_bfs(num_stages, 1, num_microbatches)


def looped_bfs(num_devices: int, stages_per_device: int, num_microbatches: int) -> Schedule:
    """Looped breadth-first: all microbatches through one stage, then the device's next stage.

    All forwards precede all backwards (Lamy-Poirier 2022, arXiv:2211.05953). Equal stages take
    (num_microbatches stages_per_device + num_devices - 1) (forward + backward) seconds if there are
    at least as many microbatches as devices, and all microbatches are alive at once. A stage's
    weights are needed in one contiguous time for all microbatches.
    """
    _check(num_devices, stages_per_device, num_microbatches)
    groups = [range(num_microbatches)]
    return lay_out(
        [
            [one_a_tick([*passes("F", stages, groups), *passes("B", stages, groups)])]
            for stages in _stages(num_devices, stages_per_device)
        ]
    )


def one_f_one_b(num_stages: int, num_microbatches: int, paired: bool = False) -> Schedule:
    """1F1B: each backward as early as possible (Narayanan et al. 2021, arXiv:2006.09503).

    One stage a device. Equal stages take as long as under GPipe, and stage i holds
    min(num_microbatches, num_stages - i) live microbatches.

    Args:
      num_stages: stages, and devices.
      num_microbatches: microbatches of a step.
      paired: puts a forward and a backward into each tick. Without it, devices that proceed tick by
        tick spend nearly every tick on the longer of the two, since some device performs it. With
        it, they take no longer than devices that run freely, but stage i holds
        min(num_microbatches, 2 (num_stages - i) - 1) live microbatches.
    """
    checked_int("num_stages", num_stages)
    return interleaved_1f1b(num_stages, 1, num_microbatches, paired)


def interleaved_1f1b(
    num_devices: int, stages_per_device: int, num_microbatches: int, paired: bool = False
) -> Schedule:
    """Interleaved 1F1B: several stages a device (Narayanan et al. 2021, arXiv:2104.04473, 2.2).

    Microbatches pass the devices in groups of num_devices, or of a few more if num_devices does not
    divide their number: a group of at least num_devices never waits for its own first microbatch.
    The bubble shrinks by up to stages_per_device, at the cost of more messages and more live
    microbatches. `paired` is as in `one_f_one_b`.
    """
    _check(num_devices, stages_per_device, num_microbatches)
    if not paired:
        orders = _interleaved_orders(num_devices, stages_per_device, num_microbatches)
        return lay_out([[one_a_tick(order)] for order in orders])
    groups = _groups(num_microbatches, num_devices)
    return lay_out(
        [
            [one_a_tick(passes("F", stages, groups)), one_a_tick(passes("B", stages, groups))]
            for stages in _stages(num_devices, stages_per_device)
        ]
    )


def zero_bubble(num_stages: int, num_microbatches: int) -> Schedule:
    """ZB-H1: 1F1B whose weight gradients fill the bubble (Qi et al. 2024, arXiv:2401.10241).

    Stage i delays its weight gradients by i microbatches, and the last of them fill the ticks in
    which it idles under 1F1B. No stage holds more than min(num_microbatches, num_stages) live
    microbatches, the number of the first stage under 1F1B.
    """
    checked_int("num_stages", num_stages)
    return interleaved_zero_bubble(num_stages, 1, num_microbatches)


def interleaved_zero_bubble(
    num_devices: int, stages_per_device: int, num_microbatches: int
) -> Schedule:
    """Interleaved 1F1B whose weight gradients fill the bubble, as in `zero_bubble`.

    Device i delays its weight gradients by i backwards. The bubble is at most that of interleaved
    1F1B, and a device holds at most i more live microbatches than under it.
    """
    _check(num_devices, stages_per_device, num_microbatches)
    orders = _interleaved_orders(num_devices, stages_per_device, num_microbatches)
    return lay_out(
        [[one_a_tick(delay_weight_gradients(order, device))] for device, order in enumerate(orders)]
    )


def _interleaved_orders(
    num_devices: int, stages_per_device: int, num_microbatches: int
) -> list[list[Action]]:
    """The order of each device under interleaved 1F1B, one action a tick."""
    if stages_per_device == 1:
        groups = [range(num_microbatches)]
        return [
            alternate(
                passes("F", stages, groups), passes("B", stages, groups), num_devices - 1 - device
            )
            for device, stages in enumerate(_stages(num_devices, 1))
        ]
    # One action a tick, in the order of the paired table. That order has no circular waits.
    paired = interleaved_1f1b(num_devices, stages_per_device, num_microbatches, paired=True)
    return [
        [action for cell in column for action in cell] for column in zip(*paired.ticks, strict=True)
    ]


def _stages(num_devices: int, stages_per_device: int) -> list[range]:
    """The stages of each device, placed round-robin."""
    return [
        range(device, num_devices * stages_per_device, num_devices) for device in range(num_devices)
    ]


def _groups(num_microbatches: int, num_devices: int) -> list[range]:
    """Splits the microbatches into the most groups of at least num_devices, of nearly equal size.

    One group if there are fewer microbatches than devices.
    """
    count = max(1, num_microbatches // num_devices)
    bounds = [num_microbatches * group // count for group in range(count + 1)]
    return [range(first, after) for first, after in pairwise(bounds)]


def _check(num_devices: int, stages_per_device: int, num_microbatches: int) -> None:
    checked_int("num_devices", num_devices)
    checked_int("stages_per_device", stages_per_device)
    checked_int("num_microbatches", num_microbatches)
