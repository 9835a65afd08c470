"""Batch analysis: a split that changes the result is refused; an accepted one gives the full
batch's.
"""

import re
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from layerwise_jax.batch.analysis import BatchError, analyze_batching
from layerwise_jax.trace.layers import trace_layers
from tests.models.zoo import CASES, Case
from tests.support.batching_cases import (
    ACCEPTED,
    BATCH,
    IN_AXES,
    REFUSED,
    Function,
    draw_inputs,
    draw_weight,
)
from tests.support.batching_run import Split, assert_equal, combine

TOLERANCE = 1e-6

# JAX writes these otherwise for one example: a permutation has as many rounds as its length asks
# for, `solve` and the batching of a kernel drop an axis of length one.
OTHER_FOR_ONE_EXAMPLE = {"gradients", "mixup", "a matrix for each example", "kernel under vmap"}


def split(fn: Function, parts: int) -> Split:
    axes = tuple(IN_AXES[name] for name in sorted(IN_AXES))
    return Split(fn, draw_weight(), (draw_inputs(),), axes, parts)


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name: str) -> None:
    case = ACCEPTED[name]
    run = split(case.fn, 2)
    batching = run.analyse(reduce=case.reduce)
    assert tuple(role.kind for role in batching.outputs) == case.kinds
    assert_equal(run.run_in_parts(batching), run.run_whole(), TOLERANCE)


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted_with_parts_of_one_example(name: str) -> None:
    """JAX writes some operations differently for one example, batched matrix products and
    `take_along_axis` too.
    """
    case = ACCEPTED[name]
    run = split(case.fn, BATCH)
    if name in OTHER_FOR_ONE_EXAMPLE:
        with pytest.raises(BatchError, match="does other operations"):
            run.analyse(reduce=case.reduce)
        return
    batching = run.analyse(reduce=case.reduce)
    assert_equal(run.run_in_parts(batching), run.run_whole(), TOLERANCE)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    case = REFUSED[name]
    with pytest.raises(BatchError) as raised:
        split(case.fn, 2).analyse(reduce=case.reduce)
    assert re.search(case.words, str(raised.value)), raised.value


def split_case(case: Case, fn: Function, parts: int) -> Split:
    axes = case.in_axes or (0,) * len(case.inputs)
    return Split(fn, case.params, case.inputs, axes, parts)


@pytest.mark.parametrize("name", CASES)
def test_zoo(name: str) -> None:
    """Every model splits, but for those that normalise by statistics of the batch."""
    case = CASES[name]()
    for parts in (2, 4, 8):
        run = split_case(case, case.loss_and_outputs, parts)
        if case.state:
            with pytest.raises(BatchError, match="batch normalisation"):
                run.analyse(reduce=case.reduce)
        else:
            loss, *outputs = run.analyse(reduce=case.reduce).outputs
            assert loss.kind == "reduced"
            assert {role.kind for role in outputs} == {"rows"}


@pytest.mark.parametrize("name", ["gpt_dropout", "mixture_of_experts"])
def test_zoo_runs_in_parts(name: str) -> None:
    case = CASES[name]()
    run = split_case(case, case.loss_and_outputs, 4)
    batching = run.analyse(reduce=case.reduce)
    assert_equal(run.run_in_parts(batching), run.run_whole(), case.tolerance)


@pytest.mark.parametrize("name", ["resnet_train", "nnx_batch_norm_train"])
def test_statistics_of_each_microbatch(name: str) -> None:
    case = CASES[name]()
    run = split_case(case, case.loss_and_outputs, 2)
    count = len(run.trace().signature.outputs_avals)
    batching = run.analyse(reduce="mean", statistics="per_microbatch", state=tuple(range(2, count)))
    assert [role.kind for role in batching.outputs] == ["reduced", "rows"] + ["state"] * (count - 2)
    inferred = run.analyse(statistics="per_microbatch", state=tuple(range(2, count))).outputs[0]
    assert inferred.combine == "mean"
    with pytest.raises(BatchError, match="is a mean over the examples, but reduce says 'sum'"):
        run.analyse(reduce="sum", statistics="per_microbatch", state=tuple(range(2, count)))


def normalised(x: jax.Array) -> jax.Array:
    return (x - jnp.mean(x, 0)) / jnp.sqrt(jnp.var(x, 0) + 1e-3)


def test_statistics_are_those_of_the_part() -> None:
    def fn(weight: Any, inputs: Any) -> Any:
        x = inputs["x"] * weight
        return normalised(x), jnp.sort(x, 0), jnp.mean(jnp.square(normalised(x))), jnp.max(x)

    run = split(fn, 2)
    batching = run.analyse(reduce="mean", statistics="per_microbatch")
    assert [role.kind for role in batching.outputs] == ["rows", "rows", "reduced", "reduced"]
    halves = [Split(fn, run.params, run.part(i), run.axes, 1).run_whole() for i in range(2)]
    wanted = [
        combine(role, x)
        for role, x in zip(batching.outputs, zip(*halves, strict=True), strict=True)
    ]
    assert_equal(run.run_in_parts(batching), wanted, TOLERANCE)


@pytest.mark.parametrize("name", ["draws hidden in a loop", "length of the batch as a number"])
def test_statistics_excuse_nothing_else(name: str) -> None:
    fn = REFUSED[name].fn
    run = split(lambda weight, inputs: fn(weight, inputs | {"x": normalised(inputs["x"])}), 2)
    with pytest.raises(BatchError, match=r"draws by the shape|length of the batch"):
        run.analyse(statistics="per_microbatch")


def test_new_state_must_be_asked_for() -> None:
    def fn(weight: Any, inputs: Any) -> Any:
        return inputs["x"] * weight, 0.9 * weight + 0.1 * jnp.mean(inputs["x"], (0, 1)), weight + 1

    run = split(fn, 2)
    with pytest.raises(BatchError, match=r"Output \[1\] is new state that depends on the examples"):
        run.analyse(state=(1, 2))
    kinds = [role.kind for role in run.analyse(state=(1, 2), statistics="per_microbatch").outputs]
    assert kinds == ["rows", "state", "whole"]


def test_one_part_is_never_mixed() -> None:
    for name, case in REFUSED.items():
        roles = split(case.fn, 1).analyse(reduce=case.reduce).outputs
        assert {role.kind for role in roles} <= {"rows", "whole", "reduced"}, name


def test_array_as_long_as_a_part() -> None:
    closed_over = jnp.ones((BATCH // 2, 1, 1))
    run = split(lambda weight, inputs: inputs["x"] * weight * closed_over, 2)
    with pytest.raises(BatchError, match="fails on the full batch of 2 such parts"):
        run.analyse()


def test_only_draws_by_shape_are_run_at_the_full_batch() -> None:
    expected = {
        "dropout, one key": ["random_bits"],
        "dropout, keys split by the batch": ["random_split"],
        "row numbers as data": ["iota"],
        "take by row number": [],
    }
    for name, marked in expected.items():
        program = split(ACCEPTED[name].fn, 2).analyse().program
        assert [op.name for op in program.ops if op.full_rows] == marked


@pytest.mark.parametrize("size", [1, 3, 4, 6])
def test_a_part_of_any_size(size: int) -> None:
    """Roles of a part that does not divide the batch: `parts` is a fraction."""

    def fn(weight: Any, x: Any, key: Any) -> Any:
        y = jnp.tanh(x * weight) + jax.random.normal(key, x.shape) * jnp.arange(len(x))[:, None]
        return y, jnp.mean(y), jnp.sum(y), jnp.sum(y * x) / jnp.sum(x)

    layers = trace_layers(fn, jnp.float32(1), jnp.ones((size, 2)), jax.random.key(0))
    outputs = analyze_batching(layers, (0, None), Fraction(16, size)).outputs
    assert [output.kind for output in outputs] == ["rows", "reduced", "reduced", "reduced"]
    assert [output.combine for output in outputs[1:]] == ["mean", "sum", "sum"]
