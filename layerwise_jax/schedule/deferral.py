"""Deferral: moves the weight gradients of the last backwards to the end of the step."""

from __future__ import annotations

from collections.abc import Sequence

from layerwise_jax._arguments import checked_int
from layerwise_jax.schedule.table import Action, Cell, Schedule


def defer(schedule: Schedule, counts: int | Sequence[int]) -> Schedule:
    """Splits the last `counts[s]` B of each stage s into I in place and W at the end.

    A device performs its deferred W after its last other action, one a tick, in the order of their
    I. They use ticks in which the device idles at the end, and add rows if those do not suffice.
    The result passes `check` if `schedule` does. A device holds the operands of a deferred weight
    gradient until its W.

    Args:
      schedule: any schedule with backward.
      counts: backwards of each stage to split, one int or one for each stage.

    Raises:
      ValueError: `counts` has another length, or an entry is not between 0 and the stage's B.
    """
    split = _last_backwards(schedule, _checked_counts(schedule, counts))
    columns = [_deferred(list(column), split) for column in zip(*schedule.ticks, strict=True)]
    length = max(map(len, columns))
    padded = [[*column, *[()] * (length - len(column))] for column in columns]
    return Schedule(tuple(zip(*padded, strict=True)))


def _checked_counts(schedule: Schedule, counts: int | Sequence[int]) -> list[int]:
    """One count of at least 0 for each stage."""
    if isinstance(counts, int):
        counts = [counts] * schedule.num_stages
    if len(counts) != schedule.num_stages:
        raise ValueError(
            f"counts must be one int or one for each of {schedule.num_stages} stages, got "
            f"{len(counts)}."
        )
    return [checked_int(f"counts[{s}]", count, least=0) for s, count in enumerate(counts)]


def _last_backwards(schedule: Schedule, counts: Sequence[int]) -> frozenset[Action]:
    """The last `counts[s]` B of each stage s, in the order of the table."""
    backwards: list[list[Action]] = [[] for _ in counts]
    for _, _, action in schedule.actions():
        if action.kind == "B":
            backwards[action.stage].append(action)
    for stage, (count, found) in enumerate(zip(counts, backwards, strict=True)):
        if count > len(found):
            raise ValueError(
                f"counts[{stage}] must be at most {len(found)}, the B of stage {stage}, got "
                f"{count}."
            )
    return frozenset(
        action
        for count, found in zip(counts, backwards, strict=True)
        for action in found[len(found) - count :]
    )


def _deferred(column: list[Cell], split: frozenset[Action]) -> list[Cell]:
    """One device's cells with the B of `split` as I, and their W after its last action."""
    due = [action._replace(kind="W") for cell in column for action in cell if action in split]
    cells = [
        tuple(action._replace(kind="I") if action in split else action for action in cell)
        for cell in column
    ]
    while cells and not cells[-1]:
        cells.pop()
    return [*cells, *((action,) for action in due)]
