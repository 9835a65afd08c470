"""Time by the clock and by the processors, of one call."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Seconds(NamedTuple):
    """How long something took.

    Attributes:
      wall: by the clock.
      cpu: of all threads of this process together.
    """

    wall: float
    cpu: float


def timed(run: Callable[[], Any]) -> tuple[Seconds, Any]:
    """What `run` took, until all of its results were there, and its results."""
    wall, cpu = time.perf_counter(), time.process_time()
    results = jax.block_until_ready(run())
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu), results
