"""A schedule as arrays for a compiled loop: what to do at each tick, and in which slot of which
buffer the data is.

A device has three buffers, each of as few slots as the schedule allows:

    stash        what a forward leaves for its backward       held from the forward to the weight
    gradient activations  what arrived from the stage before           held from its arrival to the
    forward gradients    what arrived from the stage after            held from its arrival to the
    weight gradient
"""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from layerwise_jax.schedule.table import Action, ActionKind, Schedule
from layerwise_jax.schedule.validation import check

# A code of `ScheduleTables.backward_kind` is a place in this tuple.
BACKWARD_KINDS: tuple[ActionKind, ...] = ("B", "I", "W")
Table = NDArray[np.int32]

# A stage and a microbatch; the first and the last tick, both included, at which something is held.
Pair = tuple[int, int]
Lifetime = tuple[int, int]


@dataclass(frozen=True, eq=False)
class ScheduleTables:
    """Arrays int32 of shape [ticks, devices], -1 where a device has nothing of the kind to do.

    A tick of the loop, on each device, in this order:
      1. what arrived is put into the slots `activation_arrival` and `gradient_arrival`;
      2. the forward of `forward_microbatch`, in the device's stage number `forward_chunk` (stage //
      devices), takes its
         input from the activation slot `activation_read`, on the first stage (-1) from the
         microbatch, and fills the stash slot `stash_write`;
      3. the backward of `backward_microbatch`, in stage number `backward_chunk`, takes the
      gradients that
         `backward_kind` names, from the stash slot `stash_read` and the gradient slot
         `gradient_read`, on the last stage (-1) from the loss;
      4. the forward's result goes to the next device, the input gradient to the one before, the
      last and the first
         device being neighbours. They are what arrives at the next tick.
    """

    forward_microbatch: Table
    forward_chunk: Table
    activation_arrival: Table
    activation_read: Table
    stash_write: Table
    backward_microbatch: Table
    backward_chunk: Table
    backward_kind: Table
    stash_read: Table
    gradient_arrival: Table
    gradient_read: Table
    num_stash_slots: int
    num_activation_slots: int
    num_gradient_slots: int


def stash_slots(schedule: Schedule) -> dict[Pair, int]:
    """For each (stage, microbatch), the slot in which its device keeps what the backward needs.

    No two that are live at one tick share a slot of a device, and no device uses more slots than it
    has live at once. A slot is free again at the tick after its last use, so a loop may write
    before it reads.

    Raises:
      ScheduleError: if `check` refuses the schedule.
    """
    check(schedule)
    return _assign_slots(schedule, schedule.lifetimes)


def lower_schedule(schedule: Schedule) -> ScheduleTables:
    """The arrays by which a compiled loop performs `schedule`, one step a tick.

    Raises:
      ScheduleError: if `check` refuses the schedule.
      ValueError: if a stage s does not live on device s % num_devices: the loop sends to the next
        device only.
    """
    check(schedule)
    _check_ring(schedule)
    stash = _assign_slots(schedule, schedule.lifetimes)
    activation_lifetimes, gradient_lifetimes = _arrival_lifetimes(schedule)
    activations = _assign_slots(schedule, activation_lifetimes)
    gradients = _assign_slots(schedule, gradient_lifetimes)
    arrays = _empty_arrays(schedule)
    for tick, device, (stage, kind, microbatch) in schedule.actions():
        direction = "forward" if kind == "F" else "backward"
        arrays[f"{direction}_microbatch"][tick, device] = microbatch
        arrays[f"{direction}_chunk"][tick, device] = stage // schedule.num_devices
        if kind == "F":
            arrays["activation_read"][tick, device] = activations.get((stage, microbatch), -1)
            arrays["stash_write"][tick, device] = stash.get((stage, microbatch), -1)
        else:
            arrays["backward_kind"][tick, device] = BACKWARD_KINDS.index(kind)
            arrays["gradient_read"][tick, device] = gradients.get((stage, microbatch), -1)
            arrays["stash_read"][tick, device] = stash[stage, microbatch]
    _put_arrivals(schedule, arrays["activation_arrival"], activation_lifetimes, activations)
    _put_arrivals(schedule, arrays["gradient_arrival"], gradient_lifetimes, gradients)
    return ScheduleTables(
        **arrays,
        num_stash_slots=_num_slots(stash),
        num_activation_slots=_num_slots(activations),
        num_gradient_slots=_num_slots(gradients),
    )


def _arrival_lifetimes(schedule: Schedule) -> tuple[dict[Pair, Lifetime], dict[Pair, Lifetime]]:
    """From the arrival of each (stage, microbatch)'s activation and gradient to the last tick that
    uses it.
    """
    done, activations, gradients = schedule.tick_of, {}, {}
    for (stage, kind, microbatch), tick in done.items():
        if kind == "F" and stage + 1 < schedule.num_stages:
            activations[stage + 1, microbatch] = (
                tick + 1,
                done[Action(stage + 1, "F", microbatch)],
            )
        if kind == "I" and stage > 0:
            gradients[stage - 1, microbatch] = (tick + 1, done[Action(stage - 1, "W", microbatch)])
    return activations, gradients


def _assign_slots(schedule: Schedule, lifetimes: Mapping[Pair, Lifetime]) -> dict[Pair, int]:
    """Gives each pair the lowest slot free on its device, in the order of first use, which needs no
    slot too many.
    """
    slots: dict[Pair, int] = {}
    in_use: list[list[tuple[int, int]]] = [[] for _ in range(schedule.num_devices)]
    free: list[list[int]] = [[] for _ in range(schedule.num_devices)]
    for (stage, microbatch), (first, last) in sorted(lifetimes.items(), key=lambda item: item[1]):
        device = schedule.device_of_stage[stage]
        while in_use[device] and in_use[device][0][0] < first:
            heapq.heappush(free[device], heapq.heappop(in_use[device])[1])
        slot = heapq.heappop(free[device]) if free[device] else len(in_use[device])
        heapq.heappush(in_use[device], (last, slot))
        slots[stage, microbatch] = slot
    return slots


def _put_arrivals(
    schedule: Schedule, table: Table, lifetimes: Mapping[Pair, Lifetime], slots: Mapping[Pair, int]
) -> None:
    for (stage, microbatch), (arrival, _) in lifetimes.items():
        table[arrival, schedule.device_of_stage[stage]] = slots[stage, microbatch]


def _empty_arrays(schedule: Schedule) -> dict[str, Table]:
    names = (field.name for field in fields(ScheduleTables) if not field.name.startswith("num_"))
    return {
        name: np.full((schedule.num_ticks, schedule.num_devices), -1, np.int32) for name in names
    }


def _num_slots(slots: Mapping[Pair, int]) -> int:
    return 1 + max(slots.values(), default=-1)


def _check_ring(schedule: Schedule) -> None:
    for stage, device in schedule.device_of_stage.items():
        if device != stage % schedule.num_devices:
            raise ValueError(
                f"stage {stage} lives on device {device}; the compiled loop sends to the next "
                "device only, so stage"
                f" {stage} must live on device {stage % schedule.num_devices} of "
                f"{schedule.num_devices}"
            )
