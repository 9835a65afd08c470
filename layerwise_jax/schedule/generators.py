"""Generators of published schedules: an order of actions for each device, laid out on ticks.

Every action is at the earliest tick that its operands allow. All schedules run backwards in the
order of the microbatches, so gradients accumulate in the same order under each of them. Stages are
placed round-robin.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Literal, get_args

from layerwise_jax._arguments import checked_int
from layerwise_jax.schedule.table import Action, ActionKind, Cell, Schedule
from layerwise_jax.schedule.validation import check

# Actions of one device, in order. A device with two streams performs the next action of both in
# one tick: a forward and a backward.
Stream = Sequence[Action]


def forward_only(num_devices: int, num_microbatches: int, stages_per_device: int = 1) -> Schedule:
    """Forward passes only, with one stage a device in num_microbatches + num_devices - 1 ticks."""
    _check_positive(
        num_devices=num_devices,
        num_microbatches=num_microbatches,
        stages_per_device=stages_per_device,
    )
    return _lay_out(
        [
            [_pass("F", device, num_devices, stages_per_device, num_microbatches)]
            for device in range(num_devices)
        ]
    )


def gpipe(num_stages: int, num_microbatches: int) -> Schedule:
    """GPipe: all forwards, then all backwards (Huang et al. 2019, arXiv:1811.06965).

    One stage a device. Equal stages take (num_microbatches + num_stages - 1) (forward + backward)
    seconds, and all microbatches are alive at once.
    """
    _check_positive(num_stages=num_stages, num_microbatches=num_microbatches)
    return _lay_out(
        [
            [
                [
                    *_pass("F", stage, num_stages, 1, num_microbatches),
                    *_pass("B", stage, num_stages, 1, num_microbatches),
                ]
            ]
            for stage in range(num_stages)
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
    _check_positive(
        num_devices=num_devices,
        stages_per_device=stages_per_device,
        num_microbatches=num_microbatches,
    )
    passes = [
        [
            _pass(kind, device, num_devices, stages_per_device, num_microbatches)
            for kind in ("F", "B")
        ]
        for device in range(num_devices)
    ]
    if stages_per_device == 1 and not paired:
        orders = [
            _alternate(forward, backward, num_devices - 1 - device)
            for device, (forward, backward) in enumerate(passes)
        ]
        return _lay_out([[order] for order in orders])
    schedule = _lay_out(passes)
    if paired:
        return schedule
    # One action a tick, in the order of the paired table. That order has no circular waits.
    return _lay_out(
        [
            [[action for cell in column for action in cell]]
            for column in zip(*schedule.ticks, strict=True)
        ]
    )


def zero_bubble(num_stages: int, num_microbatches: int) -> Schedule:
    """ZB-H1: 1F1B whose weight gradients fill the bubble (Qi et al. 2024, arXiv:2401.10241).

    Stage i delays its weight gradients by i microbatches, and the last of them fill the ticks in
    which it idles under 1F1B. No stage holds more than min(num_microbatches, num_stages) live
    microbatches, the number of the first stage under 1F1B.
    """
    _check_positive(num_stages=num_stages, num_microbatches=num_microbatches)
    return _lay_out(
        [[_zero_bubble_order(stage, num_stages, num_microbatches)] for stage in range(num_stages)]
    )


def _zero_bubble_order(stage: int, num_stages: int, num_microbatches: int) -> Stream:
    forward, input_gradient, weight_gradient = (
        _pass(kind, stage, num_stages, 1, num_microbatches) for kind in ("F", "I", "W")
    )
    order: list[Action] = []
    for action in _alternate(forward, input_gradient, num_stages - 1 - stage):
        order.append(action)
        if action.kind == "I" and action.microbatch >= stage:
            order.append(weight_gradient[action.microbatch - stage])
    return order + weight_gradient[max(0, num_microbatches - stage) :]


def _pass(
    kind: ActionKind, device: int, num_devices: int, stages_per_device: int, num_microbatches: int
) -> list[Action]:
    """One device's actions of one kind, group by group.

    Each group passes all stages of the device, in ascending order for F, else descending.
    """
    rounds = range(stages_per_device)
    return [
        Action(index * num_devices + device, kind, microbatch)
        for group in _groups(num_microbatches, num_devices)
        for index in (rounds if kind == "F" else reversed(rounds))
        for microbatch in group
    ]


def _groups(num_microbatches: int, num_devices: int) -> list[range]:
    """Splits the microbatches into the most groups of at least num_devices, of nearly equal size.

    One group if there are fewer microbatches than devices.
    """
    count = max(1, num_microbatches // num_devices)
    bounds = [num_microbatches * group // count for group in range(count + 1)]
    return [range(first, after) for first, after in pairwise(bounds)]


def _alternate(forward: Stream, backward: Stream, warm_up: int) -> list[Action]:
    """`warm_up` forwards, then forwards and backwards in turn, then the remaining backwards."""
    warm_up = min(warm_up, len(forward))
    steady = len(forward) - warm_up
    pairs = zip(forward[warm_up:], backward[:steady], strict=True)
    return [*forward[:warm_up], *(action for pair in pairs for action in pair), *backward[steady:]]


def _lay_out(streams: Sequence[Sequence[Stream]]) -> Schedule:
    """Lays streams out on ticks: each action at the earliest tick that its operands allow.

    Args:
      streams: the streams of each device, one or two.
    """
    num_stages = 1 + max(
        action.stage for device in streams for stream in device for action in stream
    )
    waiting = [[list(reversed(stream)) for stream in device] for device in streams]
    done: set[Action] = set()
    ticks: list[tuple[Cell, ...]] = []
    while any(stream for device in waiting for stream in device):
        row = tuple(_next_cell(device, done, num_stages) for device in waiting)
        assert any(row), f"the order of the streams is a deadlock after tick {len(ticks)}"
        done.update(effect for cell in row for action in cell for effect in action.effects)
        ticks.append(row)
    return Schedule(tuple(ticks))


def _next_cell(waiting: Iterable[list[Action]], done: set[Action], num_stages: int) -> Cell:
    """Pops the next action of each reversed stream if its operands are done.

    A backward may read the forward of the same cell.
    """
    cell: list[Action] = []
    for stream in waiting:
        if stream and all(need in done or need in cell for need in stream[-1].needs(num_stages)):
            cell.append(stream.pop())
    return tuple(cell)


def _check_positive(**counts: int) -> None:
    for name, count in counts.items():
        checked_int(name, count)


ScheduleName = Literal["1f1b", "gpipe", "interleaved_1f1b", "zero_bubble"]


def make_schedule(
    schedule: ScheduleName | Schedule, num_stages: int, num_microbatches: int, num_devices: int
) -> Schedule:
    """The named schedule for a pipeline, or the given table if it fits the pipeline.

    Raises:
      ValueError: an unknown name, or a table for other stages or microbatches.
      ScheduleError: `check` refuses the table.
    """
    match schedule:
        case "1f1b":
            return one_f_one_b(num_stages, num_microbatches, paired=True)
        case "gpipe":
            return gpipe(num_stages, num_microbatches)
        case "zero_bubble":
            return zero_bubble(num_stages, num_microbatches)
        case "interleaved_1f1b" if num_stages % num_devices == 0:
            return interleaved_1f1b(
                num_devices, num_stages // num_devices, num_microbatches, paired=True
            )
        case "interleaved_1f1b":
            raise ValueError(
                f"num_stages must be a multiple of the {num_devices} devices on the mesh's axis "
                f"'stage', got {num_stages}."
            )
        case Schedule():
            return _checked(schedule, num_stages, num_microbatches)
    names = ", ".join(map(repr, get_args(ScheduleName)))
    raise ValueError(f"schedule must be {names} or a Schedule, got {schedule!r}.")


def _checked(schedule: Schedule, num_stages: int, num_microbatches: int) -> Schedule:
    check(schedule)
    given = (schedule.num_stages, schedule.num_microbatches)
    if given != (num_stages, num_microbatches) or not schedule.has_backward:
        raise ValueError(
            f"schedule must be for {num_stages} stages and {num_microbatches} microbatches with "
            f"backward, got one for {given[0]} stages and {given[1]} microbatches"
            f"{'' if schedule.has_backward else ', forward only'}."
        )
    return schedule
