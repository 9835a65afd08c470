"""Pictures of a simulated schedule: a Gantt chart, and a trace for Perfetto (ui.perfetto.dev)."""

# matplotlib's stubs leave **kwargs untyped.
# pyright: reportUnknownMemberType=false

import json
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise_jax.schedule.colours import COLOURS, NAMES
from layerwise_jax.schedule.table import ACTION_KINDS, ActionKind
from layerwise_jax.schedule.timing import ScheduleSimulation

if TYPE_CHECKING:
    from matplotlib.axes import Axes


# Width of an action's text.
LABEL_INCHES = 0.2


def draw_timeline(simulation: ScheduleSimulation, axes: "Axes | None" = None) -> "Axes":
    """Draws a Gantt chart: one row for each device from the top, one bar for each action.

    Bars that are wide enough show the text of their action.

    Args:
      simulation: result of `simulate_schedule`.
      axes: matplotlib axes to draw into; None for those of a new figure. The caller saves or shows
        `axes.figure`.

    Raises:
      ImportError: matplotlib is not installed.
    """
    axes = _new_axes(simulation) if axes is None else axes
    narrowest_label = simulation.makespan * LABEL_INCHES / axes.figure.bbox.width * axes.figure.dpi
    for span in simulation.spans:
        width = span.end - span.start
        colour = COLOURS[span.action.kind]
        axes.barh(
            span.device,
            width,
            left=span.start,
            height=0.9,
            color=colour,
            edgecolor="white",
            linewidth=0.5,
        )
        if width >= narrowest_label:
            axes.text(
                (span.start + span.end) / 2,
                span.device,
                str(span.action),
                ha="center",
                va="center",
                fontsize=6,
            )
    devices = range(simulation.schedule.num_devices)
    axes.set_yticks(list(devices), [f"device {device}" for device in devices])
    axes.set_ylim(len(devices) - 0.5, -0.5)
    axes.set_xlim(0, simulation.makespan or 1)
    axes.set_xlabel("seconds")
    axes.set_title(f"makespan {simulation.makespan:.6g} s, bubble {simulation.bubble_share:.1%}")
    _add_legend(simulation, axes)
    return axes


def trace_events(simulation: ScheduleSimulation) -> dict[str, Any]:
    """The simulation in Chrome's trace event format, times in microseconds.

    Each device is a thread with its actions, and has a counter of live microbatches.
    """
    devices = range(simulation.schedule.num_devices)
    threads = [
        _event("M", "thread_name", device, args={"name": f"device {device}"}) for device in devices
    ]
    actions = [
        _event(
            "X",
            str(action),
            device,
            cat=NAMES[action.kind],
            ts=start * 1e6,
            dur=(end - start) * 1e6,
            args={"stage": action.stage, "microbatch": action.microbatch},
        )
        for action, device, start, end in simulation.spans
    ]
    return {"traceEvents": threads + actions + _live_counters(simulation), "displayTimeUnit": "ms"}


def write_trace(simulation: ScheduleSimulation, path: str | PathLike[str]) -> None:
    """Writes `trace_events` to `path` as JSON, for ui.perfetto.dev or chrome://tracing."""
    Path(path).write_text(json.dumps(trace_events(simulation)) + "\n")


def _live_counters(simulation: ScheduleSimulation) -> list[dict[str, Any]]:
    """Counter events: the live microbatches of a device after each of its F, B and W."""
    if not simulation.schedule.has_backward:
        return []
    live = [0] * simulation.schedule.num_devices
    events: list[dict[str, Any]] = []
    for action, device, start, end in simulation.spans:
        if action.kind == "I":
            continue
        begins = action.kind == "F"
        live[device] += 1 if begins else -1
        time = start if begins else end
        events.append(
            _event(
                "C",
                f"live microbatches, device {device}",
                device,
                ts=time * 1e6,
                args={"live": live[device]},
            )
        )
    return events


def _event(phase: str, name: str, device: int, **fields: Any) -> dict[str, Any]:
    return {"ph": phase, "name": name, "pid": 0, "tid": device, **fields}


def _new_axes(simulation: ScheduleSimulation) -> "Axes":
    import matplotlib.pyplot as plt

    width = min(24.0, 2 + 0.35 * simulation.schedule.num_ticks)
    _, axes = plt.subplots(
        figsize=(width, 1.5 + 0.4 * simulation.schedule.num_devices), layout="constrained"
    )
    return axes


def _add_legend(simulation: ScheduleSimulation, axes: "Axes") -> None:
    from matplotlib.patches import Patch

    kinds: list[ActionKind] = [
        kind for kind in ACTION_KINDS if any(span.action.kind == kind for span in simulation.spans)
    ]
    handles = [Patch(color=COLOURS[kind], label=NAMES[kind]) for kind in kinds]
    axes.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.2),
        ncols=len(kinds),
        frameon=False,
    )
