"""Executor `host`: loss, outputs, every gradient leaf and state are the unstaged ones.

The first step runs all columns in the caller's thread, the second one a thread a column: both are
held against the unstaged function, and their bits against each other.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
import pytest

from layerwise_jax.schedule.registry import ScheduleName
from tests.models.zoo import CASES
from tests.support.host import on_host, run_on_host
from tests.support.staging import (
    Run,
    assert_trees_close,
    even_boundaries,
    run_unstaged,
    stage_step,
    trace_case,
    uneven_boundaries,
)

TOLERANCE = 2e-6


@dataclass(frozen=True)
class Way:
    """A way to train: schedule, residuals, how many of what, cut how."""

    schedule: ScheduleName
    remat: Literal["stage", "cheap"] | None
    num_stages: int
    num_devices: int
    num_microbatches: int
    cut: Callable[[int, int], tuple[int, ...]] = even_boundaries

    def __str__(self) -> str:
        counts = f"{self.num_stages}on{self.num_devices}-{self.num_microbatches}"
        return f"{self.schedule}-{self.remat or 'all'}-{counts}"


# Microbatches fewer than, as many as, and more than stages; every schedule; every policy.
WAYS = [
    Way("1f1b", None, 4, 4, 2, uneven_boundaries),
    Way("1f1b", "cheap", 2, 2, 8),
    Way("gpipe", "cheap", 4, 4, 4, uneven_boundaries),
    Way("gpipe", "stage", 3, 3, 2),
    Way("interleaved_1f1b", "stage", 4, 2, 2),
    Way("interleaved_1f1b", None, 6, 3, 4, uneven_boundaries),
    Way("zero_bubble", "cheap", 4, 4, 4, uneven_boundaries),
    Way("zero_bubble", None, 2, 2, 8),
    Way("zb_v", None, 4, 2, 4, uneven_boundaries),
    Way("dualpipe_v", "cheap", 4, 2, 8),
    Way("looped_bfs", None, 4, 2, 4, uneven_boundaries),
    Way("interleaved_zero_bubble", "cheap", 4, 2, 4),
]
# Cheap models, and of all schedules and policies one; `test_small_models` has the rest small.
IN_THE_DEFAULT_RUN = {
    (name, WAYS[i])
    for name, i in (
        ("checkpointed", 0),
        ("unet", 1),
        ("nnx_batch_norm_train", 3),
        ("custom_derivatives", 4),
        ("bfloat16", 5),
        ("odd_outputs", 6),
        ("mlp", 7),
        ("odd_outputs", 8),
        ("mlp", 9),
    )
}


def cases() -> list[Any]:
    """Every model in every way; what continuous integration leaves out is marked slow."""
    return [
        pytest.param(
            name,
            way,
            id=f"{name}-{way}",
            marks=() if (name, way) in IN_THE_DEFAULT_RUN else pytest.mark.slow,
        )
        for name in sorted(CASES)
        for way in WAYS
    ]


@functools.cache
def unstaged(name: str, num_microbatches: int) -> Run:
    return run_unstaged(CASES[name](), num_microbatches)


@pytest.mark.parametrize(("name", "way"), cases())
def test_one_step_is_the_unstaged_one(name: str, way: Way, stage_mesh: Callable) -> None:
    case = CASES[name]()
    if len(trace_case(case, case.loss_fn, way.num_microbatches)) < way.num_stages:
        pytest.skip("the model has fewer layers than that")
    pipeline = on_host(
        stage_step(
            case,
            stage_mesh(way.num_devices),
            way.num_microbatches,
            way.cut,
            num_stages=way.num_stages,
            schedule=way.schedule,
        ),
        remat=way.remat,
    )
    by_one_thread, by_threads = (jax.device_get(run_on_host(case, pipeline)) for _ in range(2))
    want = unstaged(name, way.num_microbatches if case.state else 1)
    for part in ("loss", "outputs", "gradients", "params"):
        one, many = getattr(by_one_thread, part), getattr(by_threads, part)
        jax.tree.map(np.testing.assert_array_equal, one, many)
        assert_trees_close(many, getattr(want, part), max(case.tolerance, TOLERANCE))
