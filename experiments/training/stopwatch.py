"""Wall and processor time of one call."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Seconds(NamedTuple):
    """Elapsed seconds.

    Attributes:
      wall: by the clock.
      cpu: of all threads of this process together.
    """

    wall: float
    cpu: float


def timed(run: Callable[[], Any]) -> tuple[Seconds, Any]:
    """Seconds of `run` until all of its results are ready, and the results."""
    wall, cpu = time.perf_counter(), time.process_time()
    results = jax.block_until_ready(run())
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu), results
