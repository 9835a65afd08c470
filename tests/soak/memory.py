"""Memory over many ring runs and training steps: neither live arrays nor resident bytes grow."""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh

from tests.models.checkpoint import X, draw, stage
from tests.models.ring import gpt, make_ring, prompts_for

WARM_UP = 100  # runs in which caches and allocators reach their size
ALLOWED_BYTES = 4096  # growth per run; a leaked array of the models here has more
Check = Callable[[int, int], str]


def resident_bytes() -> int:
    """Bytes of this process in RAM."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Growth:
    """Checks that repeated runs leave no arrays and no memory behind.

    The limit of resident bytes is per run since the warm-up, with one arena of 16 MiB to spare.
    """

    def __init__(self, run: Callable[[int], Any]) -> None:
        self.run = run
        self.calls = 0

    def __call__(self, seed: int, index: int) -> str:
        self.run(index)
        self.calls += 1
        if self.calls % WARM_UP:
            return "run"
        gc.collect()
        arrays = len(jax.live_arrays())
        if self.calls == WARM_UP:
            self.arrays = arrays
            self.bytes = resident_bytes()
        runs = self.calls - WARM_UP
        assert arrays <= self.arrays, f"{arrays - self.arrays} arrays more after {runs} runs"
        grown = resident_bytes() - self.bytes
        assert grown <= runs * ALLOWED_BYTES + 2**24, f"{grown:,} bytes more after {runs} runs"
        return "run"


def ring_runs() -> Check:
    """Generation of a few tokens by a ring of two stages."""
    ring = make_ring("gpt", 4, 2, 2)
    params = ring.place(gpt(4))
    prompts = prompts_for(ring)
    return Growth(lambda _: ring.generate(params, prompts, 3, steps_per_call=3))


def training_steps() -> Check:
    """Adam steps of a pipeline of two stages."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("stage",), axis_types=(AxisType.Auto,))
    pipeline = stage(mesh)
    step = pipeline.train_step(optax.adam(1e-3))
    held: dict[str, Any] = {"staged": pipeline.place(draw())}
    held["state"] = step.init(held["staged"])
    inputs = functools.partial(jnp.add, X)

    def run(index: int) -> None:
        held["staged"], held["state"], value = step(
            held["staged"], held["state"], inputs(index / 1000)
        )
        assert np.isfinite(float(value))

    return Growth(run)


PARTS: dict[str, Callable[[], Check]] = {
    "ring runs": ring_runs,
    "training steps": training_steps,
}
