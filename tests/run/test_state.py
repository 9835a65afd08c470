"""State: what a function gives back as new values of its parameters, updated by one microbatch
after the other.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layerwise_jax.batch.analysis import BatchError
from layerwise_jax.pipeline import Pipeline
from layerwise_jax.stage.cut import CutError
from tests.models.linen import ResNet, variables_of
from tests.models.plain import dense, draw_layers, tanh_chain
from tests.models.zoo import BATCH, CASES
from tests.support.staging import (
    assert_trees_close,
    compile_lightly,
    run_unstaged,
    stage_case,
    with_state,
)
from tests.support.zoo_case import WIDTH, Case, draw_features


def stage_stateful(
    case: Case, mesh: jax.sharding.Mesh, num_microbatches: int, **options: Any
) -> Pipeline:
    options = {"state": case.state, "batch_statistics": "per_microbatch", **options}
    return stage_case(case, case.fn, mesh, num_microbatches, **options)


@pytest.mark.parametrize(("num_stages", "num_microbatches"), [(2, 4), (4, 2)])
@pytest.mark.parametrize("name", ["resnet_train", "nnx_batch_norm_train"])
def test_running_averages_are_updated_in_the_order_of_microbatches(
    name: str, num_stages: int, num_microbatches: int, stage_mesh: Callable
) -> None:
    """Outputs and state are those of a loop over microbatches; a second batch goes on from
    there.
    """
    case = CASES[name]()
    pipeline = stage_stateful(case, stage_mesh(num_stages), num_microbatches)
    run, staged, params = compile_lightly(pipeline), pipeline.place(case.params), case.params
    for inputs in (case.inputs, tuple(x[::-1] for x in case.inputs)):
        (outputs, nothing), staged = run(staged, *inputs)
        assert jax.tree.leaves(nothing) == []
        rows, want = BATCH // num_microbatches, []
        for start in range(0, BATCH, rows):
            output, state = jax.jit(case.fn)(params, *(x[start : start + rows] for x in inputs))
            params = with_state(params, state)
            want.append(output)
        assert_trees_close(outputs, jnp.concatenate(want), case.tolerance)
        assert_trees_close(pipeline.gather(staged), params, case.tolerance)


def test_the_order_of_microbatches_shows_in_running_averages() -> None:
    """Else the test above would not see it."""
    case = CASES["resnet_train"]()
    backwards = Case(**{**vars(case), "inputs": tuple(x[::-1] for x in case.inputs)})
    forwards, backwards = (jax.tree.leaves(run_unstaged(c, 4).params) for c in (case, backwards))
    assert (
        max(float(np.max(np.abs(x - y))) for x, y in zip(forwards, backwards, strict=True)) > 1e-3
    )


def test_statistics_of_the_batch_are_refused_unless_asked_for(stage_mesh: Callable) -> None:
    case = CASES["resnet_train"]()
    with pytest.raises(BatchError, match="per_microbatch"):
        stage_stateful(case, stage_mesh(2), 4, batch_statistics=None)


def test_state_that_evaluation_leaves_as_it_is(stage_mesh: Callable) -> None:
    model, image = ResNet(train=False), draw_features(8, 8, 3)
    params = variables_of(model, image)

    def fn(variables: Any, image: jax.Array) -> Any:
        return model.apply(variables, image, mutable=["batch_stats"])

    case = Case(
        "evaluation",
        fn,
        params,
        (image,),
        lambda outputs, _: jnp.mean(outputs[0]),
        state=lambda out: out[1],
    )
    pipeline = stage_stateful(case, stage_mesh(2), 4, batch_statistics=None)
    (outputs, _), staged = compile_lightly(pipeline)(pipeline.place(params), image)
    assert_trees_close(outputs, model.apply(params, image), case.tolerance)
    jax.tree.map(np.testing.assert_array_equal, pipeline.gather(staged), params)


def counting(uses: int, updates: bool = True) -> Case:
    """Eight layers and a running sum beside them, which `uses` of the layers read."""

    def fn(params: Any, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        total = jnp.sum(x)
        for index, layer in enumerate(params["layers"]):
            x = jnp.tanh(dense(layer, x))
            x = x + params["total"] if index < uses else x
        return x, {"total": params["total"] + total if updates else jnp.mean(x, axis=0)}

    params = {"layers": draw_layers(), "total": jnp.zeros(WIDTH)}
    return Case(
        "counting",
        fn,
        params,
        (draw_features(WIDTH),),
        lambda out, _: out[0].mean(),
        state=lambda out: out[1],
    )


def test_state_that_is_set_and_never_read_has_its_last_value(stage_mesh: Callable) -> None:
    case = counting(uses=0, updates=False)
    pipeline = stage_stateful(case, stage_mesh(4), 4)
    (outputs, _), staged = compile_lightly(pipeline)(pipeline.place(case.params), *case.inputs)
    assert_trees_close(outputs, tanh_chain(case.params["layers"], *case.inputs), case.tolerance)
    assert_trees_close(
        pipeline.gather(staged)["total"], jnp.mean(outputs[-BATCH // 4 :], axis=0), case.tolerance
    )


def drawing(per_example: bool, counts_examples: bool) -> Case:
    """Dropout whose key is made from a count, of calls or of examples."""

    def fn(params: Any, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(0), params["count"])
        y = tanh_chain(params["layers"], x)
        new = jnp.sum(x[:, 0] > -9).astype(jnp.uint32) if counts_examples else 1
        mask = jax.random.bernoulli(key, 0.5, y.shape[0 if per_example else 1 :])
        return y * mask, {"count": params["count"] + new}

    params = {"layers": draw_layers(), "count": jnp.uint32(0)}
    return Case(
        "drawing",
        fn,
        params,
        (draw_features(WIDTH),),
        lambda out, _: out[0].mean(),
        state=lambda out: out[1],
    )


def test_draws_from_a_state_that_counts_examples(stage_mesh: Callable) -> None:
    """One mask a microbatch is another each time, as in a loop; masks of the whole batch would be
    as many batches'.
    """
    case = drawing(per_example=False, counts_examples=True)
    pipeline = stage_stateful(case, stage_mesh(2), 4)
    (outputs, _), staged = compile_lightly(pipeline)(pipeline.place(case.params), *case.inputs)
    parts = [case.inputs_of(slice(start, start + 2)) for start in range(0, BATCH, 2)]
    rows = [
        case.fn({**case.params, "count": jnp.uint32(2 * m)}, *part)[0]
        for m, part in enumerate(parts)
    ]
    assert_trees_close(outputs, jnp.concatenate(rows), case.tolerance)
    assert int(pipeline.gather(staged)["count"]) == BATCH
    with pytest.raises(CutError, match="draws numbers for every example from state"):
        stage_stateful(drawing(per_example=True, counts_examples=True), stage_mesh(2), 4)


def test_state_read_on_two_stages_is_refused(stage_mesh: Callable) -> None:
    case = counting(uses=8)
    with pytest.raises(CutError, match=r"is read on stages \[0, 1\]"):
        stage_stateful(case, stage_mesh(2), 4)


def test_state_of_replicas_is_refused(stage_mesh: Callable) -> None:
    with pytest.raises(ValueError, match="by one replica, got 2 on the axis 'data'"):
        stage_stateful(CASES["resnet_train"](), stage_mesh(2, data=2), 2)


def test_state_that_is_no_parameter_is_refused(stage_mesh: Callable) -> None:
    with pytest.raises(ValueError, match=r"must pick outputs under the paths .*\['other'\]"):
        stage_stateful(
            CASES["resnet_train"](), stage_mesh(2), 2, state=lambda outputs: {"other": outputs[1]}
        )


def test_state_stacked_over_layers_is_refused(stage_mesh: Callable) -> None:
    def fn(params: Any, x: jax.Array) -> Any:
        means = []
        for index in range(8):
            x = jnp.tanh(x @ params["weight"][index])
            means.append(0.9 * params["mean"][index] + 0.1 * jnp.mean(x, axis=0))
        return x, {"mean": jnp.stack(means)}

    params = {
        "weight": jnp.stack([layer["weight"] for layer in draw_layers()]),
        "mean": jnp.zeros((8, WIDTH)),
    }
    case = Case(
        "stacked",
        fn,
        params,
        (draw_features(WIDTH),),
        lambda out, _: out[0].mean(),
        state=lambda out: out[1],
    )
    with pytest.raises(ValueError, match="stacked over the layers of a scan"):
        stage_stateful(case, stage_mesh(2), 2)
