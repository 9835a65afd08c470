"""What a split of the batch would change is refused; what is accepted gives the result of the full batch."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batching_cases import ACCEPTED, BATCH, IN_AXES, REFUSED, Function, draw_inputs, draw_weight
from batching_run import Split, assert_equal
from zoo import CASES

from layerwise_jax.batching import BatchError

TOLERANCE = 1e-6


def split(fn: Function, parts: int) -> Split:
    axes = tuple(IN_AXES[name] for name in sorted(IN_AXES))
    return Split(fn, draw_weight(), (draw_inputs(),), axes, parts)


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name: str, parts: int) -> None:
    case = ACCEPTED[name]
    run = split(case.fn, parts)
    batching = run.analyse(reduce=case.reduce)
    assert tuple(role.kind for role in batching.outputs) == case.kinds
    assert_equal(run.run_in_parts(batching, case.reduce), run.run_whole(), TOLERANCE)


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted_with_parts_of_one_example(name: str) -> None:
    """JAX writes some operations differently for one example: such a program is refused, or right."""
    case = ACCEPTED[name]
    run = split(case.fn, BATCH)
    try:
        batching = run.analyse(reduce=case.reduce)
    except BatchError as error:
        assert "does other operations" in str(error)
        return
    assert_equal(run.run_in_parts(batching, case.reduce), run.run_whole(), TOLERANCE)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    case = REFUSED[name]
    with pytest.raises(BatchError) as raised:
        split(case.fn, 2).analyse(reduce=case.reduce)
    assert re.search(case.words, str(raised.value)), raised.value
