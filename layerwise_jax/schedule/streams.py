"""Streams: orders of cells for each device, laid out on ticks as early as their operands allow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from layerwise_jax.schedule.table import Action, ActionKind, Cell, Schedule

# Cells of one device, in order. A device with two streams performs the next cell of both in one
# tick: a forward and a backward.
Stream = Sequence[Cell]


def one_a_tick(actions: Iterable[Action]) -> list[Cell]:
    """The actions as cells of one action each."""
    return [(action,) for action in actions]


def passes(
    kind: ActionKind, stages: Sequence[int], groups: Iterable[Iterable[int]]
) -> list[Action]:
    """Actions of one kind on one device, group of microbatches by group.

    Each group passes all stages of the device, in ascending order for F, else descending.

    Args:
      kind: kind of the actions.
      stages: stages of the device, ascending.
      groups: groups of microbatches.
    """
    order = stages if kind == "F" else stages[::-1]
    return [
        Action(stage, kind, microbatch)
        for group in map(tuple, groups)
        for stage in order
        for microbatch in group
    ]


def alternate(forward: Sequence[Action], backward: Sequence[Action], warm_up: int) -> list[Action]:
    """`warm_up` forwards, then forwards and backwards in turn, then the remaining backwards."""
    warm_up = min(warm_up, len(forward))
    steady = len(forward) - warm_up
    pairs = zip(forward[warm_up:], backward[:steady], strict=True)
    return [*forward[:warm_up], *(action for pair in pairs for action in pair), *backward[steady:]]


def delay_weight_gradients(actions: Iterable[Action], delay: int) -> list[Action]:
    """Splits each B into I and W, and puts each W after the I that is `delay` backwards later.

    The last `delay` W follow at the end.
    """
    order: list[Action] = []
    waiting: list[Action] = []
    for action in actions:
        if action.kind != "B":
            order.append(action)
            continue
        input_gradient, weight_gradient = action.effects
        order.append(input_gradient)
        waiting.append(weight_gradient)
        if len(waiting) > delay:
            order.append(waiting.pop(0))
    return order + waiting


def lay_out(streams: Sequence[Sequence[Stream]]) -> Schedule:
    """Puts each cell at the earliest tick that its operands allow.

    Args:
      streams: the streams of each device, one or two.
    """
    num_stages = 1 + max(
        action.stage
        for device in streams
        for stream in device
        for cell in stream
        for action in cell
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


def _next_cell(waiting: Iterable[list[Cell]], done: set[Action], num_stages: int) -> Cell:
    """Pops the next cell of each reversed stream whose operands are done, and joins them.

    A backward may read the forward of the same cell.
    """
    joined: Cell = ()
    for stream in waiting:
        if stream and _is_ready((*joined, *stream[-1]), done, num_stages):
            joined += stream.pop()
    return joined


def _is_ready(cell: Cell, done: set[Action], num_stages: int) -> bool:
    needs = (need for action in cell for need in action.needs(num_stages))
    return all(need in done or need in cell for need in needs)
