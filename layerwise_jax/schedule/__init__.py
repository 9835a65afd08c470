"""Pipeline schedules as tick tables. Imports no JAX."""

from layerwise_jax.schedule.arrays import lower_schedule
from layerwise_jax.schedule.deferral import defer
from layerwise_jax.schedule.generators import (
    forward_only,
    gpipe,
    interleaved_1f1b,
    interleaved_zero_bubble,
    looped_bfs,
    one_f_one_b,
    zero_bubble,
)
from layerwise_jax.schedule.picture import draw_timeline, trace_events, write_trace
from layerwise_jax.schedule.registry import (
    SCHEDULES,
    ScheduleFamily,
    ScheduleName,
    make_schedule,
)
from layerwise_jax.schedule.sizes import SizeChoice, SizeSearch, SizeTimes, choose_sizes
from layerwise_jax.schedule.table import Action, Schedule, ScheduleError, round_robin
from layerwise_jax.schedule.timing import ScheduleSimulation, simulate_schedule
from layerwise_jax.schedule.v_shaped import dualpipe_v, zb_v
from layerwise_jax.schedule.validation import check

__all__ = [
    "Action",
    "Schedule",
    "ScheduleError",
    "round_robin",
    "forward_only",
    "gpipe",
    "interleaved_1f1b",
    "interleaved_zero_bubble",
    "looped_bfs",
    "one_f_one_b",
    "zero_bubble",
    "dualpipe_v",
    "zb_v",
    "SCHEDULES",
    "ScheduleFamily",
    "ScheduleName",
    "make_schedule",
    "defer",
    "SizeChoice",
    "SizeSearch",
    "SizeTimes",
    "choose_sizes",
    "check",
    "ScheduleSimulation",
    "simulate_schedule",
    "draw_timeline",
    "trace_events",
    "write_trace",
    "lower_schedule",
]
