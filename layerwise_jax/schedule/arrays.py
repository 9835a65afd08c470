"""Lowering of a schedule to int32 arrays for a compiled loop: actions and buffer slots by tick.

A device has three buffers, each with as few slots as the schedule allows:

    stash        residuals of a forward           alive from the forward to the weight gradient
    activations  results of the stage before      alive from the arrival to the forward
    gradients    gradients from the stage after   alive from the arrival to the weight gradient
"""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from layerwise_jax.schedule.table import Action, ActionKind, Schedule, round_robin
from layerwise_jax.schedule.validation import check

# Entries of `ScheduleTables.backward_kind` are indices into this tuple.
BACKWARD_KINDS: tuple[ActionKind, ...] = ("B", "I", "W")
Table = NDArray[np.int32]

Pair = tuple[int, int]  # (stage, microbatch)
Lifetime = tuple[int, int]  # (first tick, last tick), both included


@dataclass(frozen=True, eq=False)
class ScheduleTables:
    """A schedule as int32 arrays of shape [ticks, devices]; -1 means no such action.

    In a tick of the loop, each device does the following, in this order:
      1. It stores the messages that arrived in the slots `activation_arrival` and
         `gradient_arrival`.
      2. Forward of `forward_microbatch` in the stage `stages_of_device[device][forward_chunk]`:
         reads the activation slot `activation_read` (-1 in the first stage: the microbatch itself)
         and writes the stash slot `stash_write`.
      3. Backward of `backward_microbatch` in the stage of `backward_chunk`: computes the gradients
         that `backward_kind` names from the stash slot `stash_read` and the gradient slot
         `gradient_read` (-1 in the last stage: the loss).
      4. It sends the forward's result to the next device and the input gradient to the previous
         one; the last and the first device are neighbours. Messages arrive at the next tick.
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
    """(stage, microbatch) -> the stash slot of its residuals on its device.

    Pairs that are alive at the same tick have different slots, and no device has more slots than
    pairs alive at once. A slot is free from the tick after its last use on, so a loop may write
    before it reads.

    Raises:
      ScheduleError: `check` refuses the schedule.
    """
    check(schedule)
    return _assign_slots(schedule, schedule.lifetimes)


def lower_schedule(schedule: Schedule) -> ScheduleTables:
    """Lowers `schedule` to the arrays that a compiled loop reads, one iteration for each tick.

    Raises:
      ScheduleError: `check` refuses the schedule.
      ValueError: stages are not placed round-robin; the loop sends to the next device only.
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
        chunk = schedule.stages_of_device[device].index(stage)
        arrays[f"{direction}_chunk"][tick, device] = chunk
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
    """Lifetimes of arrived activations and gradients, by (stage, microbatch) of the receiver.

    They last from the arrival to the last tick that reads them.
    """
    done = schedule.tick_of
    activations: dict[Pair, Lifetime] = {}
    gradients: dict[Pair, Lifetime] = {}
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
    """Assigns each pair the lowest free slot of its device, in the order of first use.

    This is interval graph colouring, for which the greedy order needs the fewest slots.
    """
    slots: dict[Pair, int] = {}
    # By device, as heaps: (last tick, slot) in use, and free slots.
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
    """Writes the slot of each message at the tick of its arrival."""
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
    """Refuses placements other than round-robin, by the first stage that differs."""
    expected = round_robin(schedule.num_stages, schedule.num_devices)
    for stage, device in sorted(schedule.device_of_stage.items()):
        if device != expected[stage]:
            raise ValueError(
                f"schedule must place stage {stage} on device {expected[stage]} of "
                f"{schedule.num_devices} for the compiled loop, which sends to the next device "
                f"only, got device {device}. Run it with executor='host'."
            )
