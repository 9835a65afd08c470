"""Whether a schedule can be run and gives the right results; if not, where it fails, shown in the
table.
"""

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
    """Accepts a schedule that can be run and whose results are right, and refuses any other.

    Afterwards: every stage does each microbatch's forward once and, if there is any backward, its
      input and its weight
    gradient once; a stage acts on one device only; an action comes at a later tick than those whose
    results it uses, save that a backward may follow its own forward in one cell; and no device ever
    holds more than `stash_bound` (stage, microbatch) pairs between forward and weight gradient.
    `stash_bound` is one number, or one a device.

    Raises:
      ScheduleError: with the part of the table where the first of these fails.
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
                    schedule, tick, device, f"{action} repeats {effect}; each may come once"
                )
            seen.add(effect)
    kinds: tuple[ActionKind, ...] = ("F", "I", "W") if schedule.has_backward else ("F",)
    for stage in range(schedule.num_stages):
        for microbatch in range(schedule.num_microbatches):
            for kind in kinds:
                if (missing := Action(stage, kind, microbatch)) not in seen:
                    _raise_missing(schedule, missing)


def _raise_missing(schedule: Schedule, missing: Action) -> None:
    """Shows the place where the stage's device last acts before the microbatch after the missing
    one.
    """
    instead = (
        "" if missing.kind == "F" else f", neither alone nor within {missing._replace(kind='B')}"
    )
    places = [
        (tick, device)
        for tick, device, (stage, _, microbatch) in schedule.actions()
        if stage == missing.stage and microbatch <= missing.microbatch
    ]
    tick, device = places[-1] if places else (schedule.num_ticks - 1, 0)
    raise _fault(
        schedule, tick, device, f"{missing} is missing{instead}; add it after the marked place"
    )


def _check_placement(schedule: Schedule) -> None:
    for tick, device, action in schedule.actions():
        home = schedule.device_of_stage[action.stage]
        if device != home:
            message = (
                f"{action} is on device {device}, but stage {action.stage} lives on device "
                f"{home}; move it there"
            )
            raise _fault(schedule, tick, device, message)


def _check_order(schedule: Schedule) -> None:
    for tick, device, action in schedule.actions():
        for need in action.needs(schedule.num_stages):
            same_cell_serves = need.stage == action.stage and need.kind == "F"
            done = schedule.tick_of[need]
            if done > tick or (done == tick and not same_cell_serves):
                message = (
                    f"{action} uses the result of {need}, which comes at tick {done}; move it "
                    "to a later tick"
                )
                raise _fault(schedule, tick, device, message)


def _check_stash(schedule: Schedule, stash_bound: int | Sequence[int]) -> None:
    bounds = (
        [stash_bound] * schedule.num_devices if isinstance(stash_bound, int) else list(stash_bound)
    )
    if len(bounds) != schedule.num_devices:
        raise ValueError(
            f"got {len(bounds)} stash bounds for {schedule.num_devices} devices; give one number, "
            "or each"
        )
    for tick, row in enumerate(schedule.live_microbatches()):
        for device, (live, bound) in enumerate(zip(row, bounds, strict=True)):
            if live > bound:
                message = (
                    f"device {device} holds {live} microbatches for their backward, {bound} "
                    "allowed; "
                )
                raise _fault(schedule, tick, device, message + "do a backward before this forward")


def _fault(schedule: Schedule, tick: int, device: int, message: str) -> ScheduleError:
    """An error whose text ends with the rows around the place, the cell in brackets."""
    first, last = max(0, tick - 3), min(schedule.num_ticks, tick + 4)
    rows = [["tick", *(f"device {column}" for column in range(schedule.num_devices))]]
    for index in range(first, last):
        rows.append([str(index), *map(cell_text, schedule.ticks[index])])
    marked = rows[1 + tick - first]
    marked[1 + device] = f"[{marked[1 + device]}]"
    return ScheduleError("\n".join([f"device {device}, tick {tick}: {message}", *align(rows)]))
