"""Training by any schedule and residual policy: loss and every gradient are the unstaged ones.

Idle devices compute on NaN and every empty slot of every buffer holds it, unless a device branches
around its bubbles.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import pytest

from layerwise_jax.schedule.registry import ScheduleName
from tests.models.zoo import CASES
from tests.support.staging import (
    assert_trees_close,
    compile_lightly,
    even_boundaries,
    run_staged,
    run_unstaged,
    stage_case,
    stage_step,
    trace_case,
    uneven_boundaries,
)

TOLERANCE = 2e-6


@dataclass(frozen=True)
class Way:
    """A way to train: by which schedule, what backward goes by, how many of what, cut how."""

    schedule: ScheduleName
    remat: Literal["stage"] | None
    num_stages: int
    num_devices: int
    num_microbatches: int
    cut: Callable[[int, int], tuple[int, ...]] = even_boundaries
    skip_bubbles: bool = False

    def __str__(self) -> str:
        residuals = "recomputed" if self.remat else "stored"
        sizes = f"{self.num_stages}on{self.num_devices}-{self.num_microbatches}"
        return f"{self.schedule}-{residuals}-{sizes}"

    def options(self) -> dict[str, Any]:
        return {
            "schedule": self.schedule,
            "remat": self.remat,
            "skip_bubbles": self.skip_bubbles,
            "bubble_fill": math.nan,
        }


# Microbatches fewer than, as many as, and many more than stages; every schedule with either kind of
# residuals.
WAYS = [
    Way("1f1b", None, 4, 4, 2, uneven_boundaries),
    Way("1f1b", None, 2, 2, 8),
    Way("gpipe", None, 4, 4, 4, uneven_boundaries, skip_bubbles=True),
    Way("interleaved_1f1b", "stage", 4, 2, 2),
    Way("interleaved_1f1b", None, 6, 3, 4, uneven_boundaries),
    Way("interleaved_1f1b", "stage", 4, 2, 8, skip_bubbles=True),
    Way("zero_bubble", "stage", 4, 4, 4, uneven_boundaries, skip_bubbles=True),
    Way("zero_bubble", None, 2, 2, 8),
]
# Skips over all stages, a weight tied across all, one across the ends, state: two ways more of
# each, all ways together.
TELLING = ["unet", "shared_blocks", "gpt", "resnet_train"]
NAMES = sorted(CASES)
CHOSEN = {(name, way) for i, name in enumerate(TELLING) for way in WAYS[i::4]}
CHOSEN |= {(name, WAYS[i % len(WAYS)]) for i, name in enumerate(NAMES)}


def cases() -> list[Any]:
    """Every model in every way; what continuous integration leaves out is marked slow."""
    return [
        pytest.param(
            name, way, id=f"{name}-{way}", marks=() if (name, way) in CHOSEN else pytest.mark.slow
        )
        for name in NAMES
        for way in WAYS
    ]


@functools.cache
def unstaged(name: str) -> tuple[Any, Any]:
    case = CASES[name]()
    return jax.device_get(
        compile_lightly(jax.value_and_grad(case.loss_fn))(case.params, *case.inputs)
    )


@pytest.mark.parametrize(("name", "way"), cases())
def test_gradients_are_the_unstaged_ones(name: str, way: Way, stage_mesh: Callable) -> None:
    case = CASES[name]()
    if len(trace_case(case, case.loss_fn, way.num_microbatches)) < way.num_stages:
        pytest.skip("the model has fewer layers than that")
    mesh, tolerance = stage_mesh(way.num_devices), max(case.tolerance, TOLERANCE)
    if case.state:
        pipeline = stage_step(
            case, mesh, way.num_microbatches, way.cut, num_stages=way.num_stages, **way.options()
        )
        got, want = run_staged(case, pipeline), run_unstaged(case, way.num_microbatches)
        for part in ("loss", "gradients", "params"):
            assert_trees_close(getattr(got, part), getattr(want, part), tolerance)
        return
    pipeline = stage_case(
        case,
        case.loss_fn,
        mesh,
        way.num_microbatches,
        way.cut,
        num_stages=way.num_stages,
        **way.options(),
    )
    value, grads = compile_lightly(pipeline.value_and_grad)(
        pipeline.place(case.params), *case.inputs
    )
    assert_trees_close((value, pipeline.gather(grads)), unstaged(name), tolerance)


@pytest.mark.parametrize(("num_stages", "num_devices"), [(4, 2), (3, 1)])
@pytest.mark.parametrize("name", ["gpt", "resnet_train", "odd_outputs"])
def test_the_forward_of_stages_that_share_a_device(
    name: str, num_stages: int, num_devices: int, stage_mesh: Callable
) -> None:
    case = CASES[name]()
    pipeline = stage_step(
        case,
        stage_mesh(num_devices),
        4,
        num_stages=num_stages,
        schedule="interleaved_1f1b",
        bubble_fill=math.nan,
    )
    want = run_unstaged(case, 4)
    got = compile_lightly(pipeline)(pipeline.place(case.params), *case.inputs)
    (loss, outputs), staged = got if case.state else (got, None)
    assert_trees_close((loss, outputs), (want.loss, want.outputs), max(case.tolerance, TOLERANCE))
    if staged is not None:
        assert_trees_close(pipeline.gather(staged), want.params, max(case.tolerance, TOLERANCE))
