"""Generators of V-shaped schedules: two stages a device, placed down and up again.

Of p devices, device r has the stages r and 2p - 1 - r. The first and the last stage share device 0,
and the middle stages p - 1 and p share device p - 1.

An order is written as steps: "F0" is the next forward of the device's first stage, "F1" of its
second one, as for "B", "I" and "W". "W" without a number is the oldest weight gradient that is
still due. A pair of steps shares a tick.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from layerwise_jax._arguments import checked_int
from layerwise_jax.schedule.streams import lay_out
from layerwise_jax.schedule.table import ACTION_KINDS, Action, ActionKind, Cell, Schedule

Step = str | tuple[str, str]
# (device, num_devices, count) -> the steps of one device for `count` microbatches.
Steps = Callable[[int, int, int], list[Step]]


def zb_v(num_devices: int, num_microbatches: int) -> Schedule:
    """ZB-V: V-shaped zero bubble with the memory of 1F1B (Qi et al. 2024, arXiv:2401.10241).

    If forwards, input and weight gradients take equal time and there are at least 2 num_devices - 1
    microbatches, no device idles between its first and its last action. A device holds at most
    2 num_devices live (stage, microbatch) pairs, as many layers as the first stage under 1F1B.
    """
    _check(num_devices, num_microbatches)
    return _lay_out(num_devices, num_microbatches, 2 * num_devices - 1, _zb_v_steps)


def dualpipe_v(num_devices: int, num_microbatches: int) -> Schedule:
    """DualPipeV: V-shaped, pairs a forward of one stage with a backward of the other.

    The V-shaped half of DualPipe (DeepSeek-AI 2024, arXiv:2412.19437): the two actions of a pair
    belong to different microbatches, so the communication of one overlaps the computation of the
    other. A device holds at most 2 num_devices + 1 live (stage, microbatch) pairs.
    """
    _check(num_devices, num_microbatches)
    return _lay_out(num_devices, num_microbatches, 2 * num_devices, _dualpipe_v_steps)


def _zb_v_steps(device: int, num_devices: int, count: int) -> list[Step]:
    """The steps of one device for `count` microbatches, at least 2 num_devices - 1."""
    below = num_devices - device  # devices from here to the turn of the V, this one included
    rest = ["I0", "W0", "F1", "I1", "W1"]
    return [
        *["F0"] * (2 * below - 1),
        *["F1", "F0"] * device,
        *["F1", "I1", "W1"] * below,
        # Steady state, with forwards of the first stage as long as there are any.
        *["F0", *rest] * (count - 2 * num_devices + device + 1),
        *rest * (below - 1),
        *["I0", "I1"] * device,
        *["I0", "W0"] * below,
        *["W1"] * device,
        *["W0"] * device,
    ]


def _dualpipe_v_steps(device: int, num_devices: int, count: int) -> list[Step]:
    """The steps of one device for `count` microbatches, at least 2 num_devices."""
    after = num_devices - 1 - device  # devices from here to the turn of the V
    steady: list[Step] = [("F0", "B1"), ("F1", "B0")] * (count - 2 * num_devices + device + 1)
    if device == num_devices - 1:
        # At the turn of the V, the first B1 needs the F1 of the F0 that would be its partner.
        steady[:1] = ["F0", "B1"]
    # The second half of these backwards is split, to fill the bubble with weight gradients.
    drain = [f"B{1 - step % 2}" for step in range(device + 1)]
    drain += [f"I{1 - step % 2}" for step in range(device + 1, 2 * device + 2)]
    return [
        *["F0"] * (2 * after),
        *["F0", "F1"] * (device + 1),
        *["I1", "W1", "F1"] * after,
        *steady,
        *["B1", ("F1", "B0")] * after,
        *drain,
        *["W", "I0"] * after,
        *["W"] * (device + 1),
    ]


def _lay_out(num_devices: int, num_microbatches: int, fewest: int, steps_of: Steps) -> Schedule:
    """Lays out the steps of all devices.

    The steps are defined for at least `fewest` microbatches; microbatches beyond
    `num_microbatches` are then left out.
    """
    count = max(fewest, num_microbatches)
    streams = [
        [_cells(steps_of(device, num_devices, count), device, num_devices, num_microbatches)]
        for device in range(num_devices)
    ]
    return lay_out(streams)


def _cells(
    steps: Iterable[Step], device: int, num_devices: int, num_microbatches: int
) -> list[Cell]:
    """The cells of one device's steps; actions of microbatches from `num_microbatches` on are
    dropped.
    """
    stages = (device, 2 * num_devices - 1 - device)
    counts: Counter[str] = Counter()  # step -> actions so far
    due: list[Action] = []  # weight gradients whose input gradient is done
    cells: list[Cell] = []
    for step in steps:
        actions = [
            _action(name, stages, counts, due)
            for name in ((step,) if isinstance(step, str) else step)
        ]
        cell = tuple(action for action in actions if action.microbatch < num_microbatches)
        if cell:
            cells.append(cell)
    return cells


def _action(name: str, stages: tuple[int, int], counts: Counter[str], due: list[Action]) -> Action:
    """The next action of a step; counts it, and updates the weight gradients that are due."""
    kind: ActionKind = next(filter(name.startswith, ACTION_KINDS))
    if kind == "W":
        stage = due[0].stage if name == "W" else stages[int(name[1])]
        action = next(each for each in due if each.stage == stage)
        due.remove(action)
        return action
    chunk = int(name[1])
    # B and I of a stage count together: both are its next backward.
    counted = f"{'F' if kind == 'F' else 'B'}{chunk}"
    action = Action(stages[chunk], kind, counts[counted])
    counts[counted] += 1
    if kind == "I":
        due.append(action._replace(kind="W"))
    return action


def _check(num_devices: int, num_microbatches: int) -> None:
    checked_int("num_devices", num_devices)
    checked_int("num_microbatches", num_microbatches)
