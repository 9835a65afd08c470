"""Validation: rejects tables that cannot run or give wrong results, and shows the faulty place."""

from collections.abc import Sequence

from layerwise_jax.schedule.table import (
    Action,
    ActionKind,
    Schedule,
    ScheduleError,
    align,
    cell_text,
)


def check(schedule: Schedule, stash_bound: int | Sequence[int] | None = None) -> None:
    """Checks that a schedule is complete, placed consistently and in a valid order.

    A valid schedule has, for each stage and microbatch, one forward and, if it has any backward,
    one input gradient and one weight gradient. All actions of a stage are on one device. An action
    is at a later tick than the actions whose results it reads; a backward may also follow its own
    forward in one cell.

    Args:
      schedule: the table to check.
      stash_bound: the most (stage, microbatch) pairs that a device may hold between forward and
        weight gradient, one number or one for each device; None for no bound.

    Raises:
      ScheduleError: a condition fails. The message shows the rows around the first fault.
      ValueError: `stash_bound` has another length than there are devices.
    """
    _check_each_once(schedule)
    _check_placement(schedule)
    _check_order(schedule)
    if stash_bound is not None:
        _check_stash(schedule, stash_bound)


def _check_each_once(schedule: Schedule) -> None:
    seen: set[Action] = set()
    for tick, device, action in schedule.actions():
        for effect in action.effects:
            if effect in seen:
                raise _fault(
                    schedule, tick, device, f"{action} repeats {effect}. Remove one of the two"
                )
            seen.add(effect)
    kinds: tuple[ActionKind, ...] = ("F", "I", "W") if schedule.has_backward else ("F",)
    for stage in range(schedule.num_stages):
        for microbatch in range(schedule.num_microbatches):
            for kind in kinds:
                if (missing := Action(stage, kind, microbatch)) not in seen:
                    _raise_missing(schedule, missing)


def _raise_missing(schedule: Schedule, missing: Action) -> None:
    """Raises the error for a missing action.

    It marks the last action of the same stage on this or an earlier microbatch.
    """
    instead = "" if missing.kind == "F" else f", as is {missing._replace(kind='B')}"
    places = [
        (tick, device)
        for tick, device, (stage, _, microbatch) in schedule.actions()
        if stage == missing.stage and microbatch <= missing.microbatch
    ]
    tick, device = places[-1] if places else (schedule.num_ticks - 1, 0)
    raise _fault(
        schedule, tick, device, f"{missing} is missing{instead}. Add it after the marked place"
    )


def _check_placement(schedule: Schedule) -> None:
    for tick, device, action in schedule.actions():
        home = schedule.device_of_stage[action.stage]
        if device != home:
            message = (
                f"{action} must be on device {home}, where stage {action.stage} first acts, got "
                f"device {device}. Move it there"
            )
            raise _fault(schedule, tick, device, message)


def _check_order(schedule: Schedule) -> None:
    for tick, device, action in schedule.actions():
        for need in action.needs(schedule.num_stages):
            same_cell_serves = need.stage == action.stage and need.kind == "F"
            done = schedule.tick_of[need]
            if done > tick or (done == tick and not same_cell_serves):
                message = (
                    f"{action} must come after {need}, whose result it reads and which is at tick "
                    f"{done}. Move it to a later tick"
                )
                raise _fault(schedule, tick, device, message)


def _check_stash(schedule: Schedule, stash_bound: int | Sequence[int]) -> None:
    bounds = (
        [stash_bound] * schedule.num_devices if isinstance(stash_bound, int) else list(stash_bound)
    )
    if len(bounds) != schedule.num_devices:
        raise ValueError(
            f"stash_bound must be one int or one for each of {schedule.num_devices} devices, got "
            f"{len(bounds)}."
        )
    for tick, row in enumerate(schedule.live_microbatches()):
        for device, (live, bound) in enumerate(zip(row, bounds, strict=True)):
            if live > bound:
                message = (
                    f"device {device} must hold at most {bound} microbatches for their backward, "
                    f"got {live}. Move a backward before this forward"
                )
                raise _fault(schedule, tick, device, message)


def _fault(schedule: Schedule, tick: int, device: int, message: str) -> ScheduleError:
    """An error with the rows from 3 ticks before to 3 ticks after, the faulty cell in brackets."""
    first = max(0, tick - 3)
    last = min(schedule.num_ticks, tick + 4)
    rows = [["tick", *(f"device {column}" for column in range(schedule.num_devices))]]
    for index in range(first, last):
        rows.append([str(index), *map(cell_text, schedule.ticks[index])])
    marked = rows[1 + tick - first]
    marked[1 + device] = f"[{marked[1 + device]}]"
    return ScheduleError("\n".join([f"device {device}, tick {tick}: {message}", *align(rows)]))
