"""The well-known schedules: each is an order of actions a device, laid out on ticks as early as
they can be.

All of them do the backwards in the order of the microbatches, so that gradients are added up in the
same order under every schedule. Stage s lives on device s % num_devices.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Literal, get_args

from layerwise_jax.schedule.table import Action, ActionKind, Cell, Schedule
from layerwise_jax.schedule.validation import check

# What one device has to do, in order. A device with two streams takes from both in one tick: a
# forward, a backward.
Stream = Sequence[Action]


def forward_only(num_devices: int, num_microbatches: int, stages_per_device: int = 1) -> Schedule:
    """Every stage forward; with one stage a device in num_microbatches + num_devices - 1 ticks."""
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
    """All forwards, then all backwards, one stage a device (Huang et al. 2019, arXiv:1811.06965).

    With equal stages (num_microbatches + num_stages - 1)(forward + backward) seconds, every
    microbatch live at once.
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
    """1F1B: each backward as soon as it can be, one stage a device (Narayanan et al. 2021,
    arXiv:2006.09503).

    With equal stages as long as GPipe, but stage i holds min(num_microbatches, num_stages - i) live
    microbatches.

    `paired` lays a forward and a backward into one tick. With one action a tick, devices that keep
    step spend nearly every tick on the longer of the two, since one of them is in it; with pairs
    they take no longer than devices that run freely. It costs stash: stage i holds
    min(num_microbatches, 2 (num_stages - i) - 1).
    """
    return interleaved_1f1b(num_stages, 1, num_microbatches, paired)


def interleaved_1f1b(
    num_devices: int, stages_per_device: int, num_microbatches: int, paired: bool = False
) -> Schedule:
    """1F1B with several stages a device (Narayanan et al. 2021, arXiv:2104.04473, section 2.2).

    Microbatches go round the devices in groups of num_devices or, where num_devices does not divide
    their number, of a few more: a group that fills the ring never waits for its own head. The
    bubble shrinks by up to stages_per_device, against more messages and more live microbatches.
    `paired` as in `one_f_one_b`.
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
    # Taken one by one, in the order in which the pairs stand, the actions cannot wait for one
    # another in a circle.
    return _lay_out(
        [
            [[action for cell in column for action in cell]]
            for column in zip(*schedule.ticks, strict=True)
        ]
    )


def zero_bubble(num_stages: int, num_microbatches: int) -> Schedule:
    """ZB-H1: 1F1B with the backward split, weight gradients filling the bubble (Qi et al. 2024,
    arXiv:2401.10241).

    Stage i puts its weight gradients off by i microbatches, so that the last of them fill the time
    in which 1F1B leaves it idle while the stages before it finish. No stage holds more than
    min(num_microbatches, num_stages) live microbatches, as many as the first one does in 1F1B.
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
    """One device's actions of one kind: a group of microbatches through all its stages, then the
    next group.
    """
    rounds = range(stages_per_device)
    return [
        Action(index * num_devices + device, kind, microbatch)
        for group in _groups(num_microbatches, num_devices)
        for index in (rounds if kind == "F" else reversed(rounds))
        for microbatch in group
    ]


def _groups(num_microbatches: int, num_devices: int) -> list[range]:
    """The microbatches in as many groups as can each have num_devices of them, of nearly equal
    size.
    """
    count = max(1, num_microbatches // num_devices)
    bounds = [num_microbatches * group // count for group in range(count + 1)]
    return [range(first, after) for first, after in pairwise(bounds)]


def _alternate(forward: Stream, backward: Stream, warm_up: int) -> list[Action]:
    """`warm_up` forwards, then one forward and one backward in turn, then the backwards that are
    left.
    """
    warm_up = min(warm_up, len(forward))
    steady = len(forward) - warm_up
    pairs = zip(forward[warm_up:], backward[:steady], strict=True)
    return [*forward[:warm_up], *(action for pair in pairs for action in pair), *backward[steady:]]


def _lay_out(streams: Sequence[Sequence[Stream]]) -> Schedule:
    """The table in which every device does the next action of each of its streams at the earliest
    tick that it can.
    """
    num_stages = 1 + max(
        action.stage for device in streams for stream in device for action in stream
    )
    waiting = [[list(reversed(stream)) for stream in device] for device in streams]
    done: set[Action] = set()
    ticks = []
    while any(stream for device in waiting for stream in device):
        row = tuple(_next_cell(device, done, num_stages) for device in waiting)
        assert any(row), f"the order of the streams is a deadlock after tick {len(ticks)}"
        done.update(effect for cell in row for action in cell for effect in action.effects)
        ticks.append(row)
    return Schedule(tuple(ticks))


def _next_cell(waiting: Iterable[list[Action]], done: set[Action], num_stages: int) -> Cell:
    """Takes from the end of each stream the action that can be done now; one cell's forward serves
    its backward.
    """
    cell: list[Action] = []
    for stream in waiting:
        if stream and all(need in done or need in cell for need in stream[-1].needs(num_stages)):
            cell.append(stream.pop())
    return tuple(cell)


def _check_positive(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is {count}; it must be at least 1")


ScheduleName = Literal["1f1b", "gpipe", "interleaved_1f1b", "zero_bubble"]


def make_schedule(
    schedule: ScheduleName | Schedule, num_stages: int, num_microbatches: int, num_devices: int
) -> Schedule:
    """The schedule of that name, or a table of the caller's if it does just this work.

    Raises:
      ValueError: an unknown name, or a table for other stages, devices or microbatches.
      ScheduleError: the table leaves something out, or does something too early.
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
                f"{num_stages} stages do not go round {num_devices} devices evenly; a multiple of "
                "the devices on the "
                "mesh's axis 'stage' is wanted."
            )
        case Schedule():
            return _checked(schedule, num_stages, num_microbatches)
    names = ", ".join(map(repr, get_args(ScheduleName)))
    raise ValueError(f"schedule is {schedule!r}; {names} or a Schedule is wanted.")


def _checked(schedule: Schedule, num_stages: int, num_microbatches: int) -> Schedule:
    check(schedule)
    came, wanted = (schedule.num_stages, schedule.num_microbatches), (num_stages, num_microbatches)
    if came != wanted or not schedule.has_backward:
        raise ValueError(
            f"The schedule is for {came[0]} stages and {came[1]} microbatches"
            f"{'' if schedule.has_backward else ', forward only'}; the pipeline has {wanted[0]} "
            f"stages and {wanted[1]} "
            "microbatches, forward and backward."
        )
    return schedule
