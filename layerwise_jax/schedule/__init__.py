"""Pipeline schedules as tick tables. Imports no JAX."""

from layerwise_jax.schedule.arrays import lower_schedule
from layerwise_jax.schedule.generators import (
    ScheduleName,
    forward_only,
    gpipe,
    interleaved_1f1b,
    make_schedule,
    one_f_one_b,
    zero_bubble,
)
from layerwise_jax.schedule.picture import draw_timeline, trace_events, write_trace
from layerwise_jax.schedule.table import Action, Schedule, ScheduleError
from layerwise_jax.schedule.timing import ScheduleSimulation, simulate_schedule
from layerwise_jax.schedule.validation import check

__all__ = [
    "Action",
    "Schedule",
    "ScheduleError",
    "ScheduleName",
    "forward_only",
    "gpipe",
    "interleaved_1f1b",
    "make_schedule",
    "one_f_one_b",
    "zero_bubble",
    "check",
    "ScheduleSimulation",
    "simulate_schedule",
    "draw_timeline",
    "trace_events",
    "write_trace",
    "lower_schedule",
]
