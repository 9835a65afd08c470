"""Simulated schedules, compared with their closed forms."""

from collections.abc import Callable
from typing import Any

from layerwise_jax.schedule import (
    Schedule,
    ScheduleSimulation,
    gpipe,
    interleaved_1f1b,
    one_f_one_b,
    simulate_schedule,
    zero_bubble,
)

FORWARD_SECONDS = 1.0
BACKWARD_SECONDS = 2.0


def schedules(num_stages: int, num_microbatches: int) -> dict[str, Schedule]:
    """Schedules by name; interleaved has two stages per device."""
    return {
        "GPipe": gpipe(num_stages, num_microbatches),
        "1F1B": one_f_one_b(num_stages, num_microbatches),
        "1F1B, paired": one_f_one_b(num_stages, num_microbatches, paired=True),
        "interleaved 1F1B": interleaved_1f1b(num_stages, 2, num_microbatches),
        "zero bubble": zero_bubble(num_stages, num_microbatches),
    }


def simulate(num_stages: int, num_microbatches: int) -> dict[str, ScheduleSimulation]:
    """Simulated schedules of equal total work: two stages per device take half as long each."""
    simulations = {}
    for name, schedule in schedules(num_stages, num_microbatches).items():
        share = num_stages / schedule.num_stages
        simulations[name] = simulate_schedule(
            schedule, FORWARD_SECONDS * share, BACKWARD_SECONDS * share
        )
    return simulations


def expected(num_stages: int, num_microbatches: int) -> dict[str, dict[str, Any]]:
    """Closed forms: makespans in seconds (Narayanan et al. 2021, arXiv:2104.04473), live
    microbatches per device.
    """
    work, rest = FORWARD_SECONDS + BACKWARD_SECONDS, num_stages - 1

    def live(bound: Callable[[int], int]) -> list[int]:
        return [min(num_microbatches, bound(device)) for device in range(num_stages)]

    return {
        "GPipe": {
            "makespan": (num_microbatches + rest) * work,
            "live": [num_microbatches] * num_stages,
        },
        "1F1B": {
            "makespan": (num_microbatches + rest) * work,
            "live": live(lambda i: num_stages - i),
        },
        "1F1B, paired": {
            "makespan": (num_microbatches + rest) * work,
            "live": live(lambda i: 2 * (num_stages - i) - 1),
        },
        "interleaved 1F1B": {"makespan": (num_microbatches + rest / 2) * work, "live": None},
        "zero bubble": {"makespan": None, "live": None},
    }


def compare_with_closed_forms(num_stages: int, num_microbatches: int) -> dict[str, Any]:
    """Makespan and live microbatches of every schedule, simulated and in closed form."""
    known = expected(num_stages, num_microbatches)
    return {
        "stages": num_stages,
        "microbatches": num_microbatches,
        "schedules": {
            name: {
                "makespan": simulation.makespan,
                "bubble": simulation.bubble_share,
                "live": list(simulation.peak_live_microbatches),
                "expected": known[name],
            }
            for name, simulation in simulate(num_stages, num_microbatches).items()
        },
    }
