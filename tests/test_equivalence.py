"""Staged and unstaged runs of a model have equal outputs, losses, gradients and state."""

import functools
from collections.abc import Callable
from itertools import product

import pytest
from jax.sharding import Mesh

from tests.models.zoo import CASES, Case
from tests.support.staging import (
    Run,
    assert_trees_close,
    even_boundaries,
    run_staged,
    run_unstaged,
    stage_step,
    uneven_boundaries,
)

STAGES = (1, 2, 3, 4, 8)
MICROBATCHES = (1, 2, 4, 8)
SHORTER_THAN_EIGHT = {
    "resnet",
    "resnet_train",
    "gpt_dropout",
    "gpt_dropout_shared",
    "gpt_dropout_keys",
}

WHOLE_TABLE = set(product(CASES, STAGES, MICROBATCHES))
# Models that take long to compile; of them there are many alike.
TRANSFORMERS = {name for name in CASES if name.startswith("gpt_")} | {
    "encoder_decoder",
    "shared_blocks",
}
# Every model at two or three numbers of stages, each with another number of microbatches: both go
# round, row by row.
COVERING_TABLE = [
    (name, STAGES[(row + column) % len(STAGES)], MICROBATCHES[(row + column) % len(MICROBATCHES)])
    for row, name in enumerate(CASES)
    for column in range(2 if name in TRANSFORMERS else 3)
]


@pytest.mark.parametrize(("name", "num_stages", "num_microbatches"), COVERING_TABLE)
def test_staged_equals_unstaged(
    name: str, num_stages: int, num_microbatches: int, stage_mesh: Callable
) -> None:
    check(CASES[name](), num_microbatches, stage_mesh(num_stages))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_stages", "num_microbatches"), sorted(WHOLE_TABLE - set(COVERING_TABLE))
)
def test_staged_equals_unstaged_in_the_rest_of_the_table(
    name: str, num_stages: int, num_microbatches: int, stage_mesh: Callable
) -> None:
    check(CASES[name](), num_microbatches, stage_mesh(num_stages))


def test_the_covering_table_leaves_nothing_out() -> None:
    """Over the models it has every pair of a number of stages and one of microbatches."""
    assert len(set(COVERING_TABLE)) == 3 * len(CASES) - len(TRANSFORMERS)
    assert {(num_stages, count) for _, num_stages, count in COVERING_TABLE} == set(
        product(STAGES, MICROBATCHES)
    )


def check(case: Case, num_microbatches: int, mesh: Mesh) -> None:
    num_stages = mesh.shape["stage"]
    cut = even_boundaries if num_stages in (2, 4) else uneven_boundaries
    if num_stages == 8 and case.name in SHORTER_THAN_EIGHT:
        with pytest.raises(ValueError, match="boundaries must rise from 0 to"):
            stage_step(case, mesh, num_microbatches, cut)
        return
    got = run_staged(case, stage_step(case, mesh, num_microbatches, cut))
    want = unstaged(case.name, num_microbatches if case.state else 1)
    for part in ("loss", "outputs", "gradients", "params"):
        assert_trees_close({part: getattr(got, part)}, {part: getattr(want, part)}, case.tolerance)


@functools.cache
def unstaged(name: str, num_microbatches: int) -> Run:
    return run_unstaged(CASES[name](), num_microbatches)
