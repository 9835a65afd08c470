"""The loop: bubbles leak nothing, equal stages have no branch, and JAX's own transformations go
through.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from layerwise_jax._jax import inner_jaxprs
from layerwise_jax.pipeline import Pipeline
from tests.models.plain import WIDTH, chain, dense, draw_layers, tanh_chain
from tests.models.zoo import BATCH, CASES, Case
from tests.support.staging import (
    STEPS_TOLERANCE,
    assert_trees_close,
    compile_lightly,
    even_boundaries,
    stage_case,
    widened,
)
from tests.support.zoo_case import draw_features, regression


def divided_by_norms() -> Case:
    """Where a layer gets zeros, as in a bubble, it divides zero by zero."""
    layers = [{**layer, "bias": jnp.zeros(WIDTH)} for layer in draw_layers()]

    def layer_fn(layer: Any, x: jax.Array) -> jax.Array:
        y = dense(layer, x)
        return y / jnp.linalg.norm(y, axis=-1, keepdims=True)

    return regression("divided_by_norms", chain(layer_fn), layers, draw_features(WIDTH))


def equal_layers() -> Case:
    return CASES["jitted"]()


@pytest.mark.parametrize(
    ("make", "num_microbatches"),
    [
        (divided_by_norms, 2),
        (divided_by_norms, 8),
        (equal_layers, 2),
        (CASES["mlp"], 8),
        (CASES["unet"], 2),
    ],
)
def test_bubbles_of_nan_leak_nothing(
    make: Callable[[], Case], num_microbatches: int, stage_mesh: Callable
) -> None:
    """With fewer microbatches than stages too, where most of the ticks are bubbles."""
    case = make()
    pipeline = stage_case(
        case, case.loss_and_outputs, stage_mesh(4), num_microbatches, bubble_fill=np.nan
    )
    staged = pipeline.place(case.params)
    got, gradients = compile_lightly(pipeline.value_and_grad)(staged, *case.inputs)
    want = compile_lightly(jax.value_and_grad(case.loss_and_outputs, has_aux=True))(
        case.params, *case.inputs
    )
    assert_trees_close((got, pipeline.gather(gradients)), want, case.tolerance)
    by_caller = compile_lightly(jax.grad(lambda staged: pipeline(staged, *case.inputs)[0]))(staged)
    assert_trees_close(pipeline.gather(by_caller), want[1], case.tolerance)


def count_primitive(jaxpr: Any, name: str) -> int:
    within = sum(count_primitive(inner, name) for eqn in jaxpr.eqns for inner in inner_jaxprs(eqn))
    return within + sum(eqn.primitive.name == name for eqn in jaxpr.eqns)


def count_branches(pipeline: Pipeline, case: Case) -> int:
    return count_primitive(
        jax.make_jaxpr(pipeline)(pipeline.place(case.params), *case.inputs).jaxpr, "cond"
    )


def test_equal_stages_have_no_branch(stage_mesh: Callable) -> None:
    case = equal_layers()
    pipeline = stage_case(case, case.fn, stage_mesh(4), 4)
    assert not pipeline.loop.wiring.needs_branch
    assert pipeline.loop.alignment.num_layers == 2
    assert count_branches(pipeline, case) == 0


def test_odd_layers_stand_under_one_branch(stage_mesh: Callable) -> None:
    """Embedding, surplus block, final norm and logits do; two blocks of each stage do not."""
    case = CASES["gpt"]()
    pipeline = stage_case(case, case.fn, stage_mesh(2), 4, lambda *_: (0, 4, 9))
    assert pipeline.loop.alignment.num_layers == 3
    assert count_branches(pipeline, case) == 1
    assert pipeline.placement.padding_bytes > 0


def test_only_what_is_alive_crosses(stage_mesh: Callable) -> None:
    case = CASES["gpt"]()
    (lane,) = stage_case(case, case.fn, stage_mesh(4), 4).loop.wiring.lanes
    assert (lane.aval.shape, lane.aval.dtype) == ((BATCH // 4, 6, WIDTH), jnp.float32)


def test_keys_integers_and_masks_cross_between_devices(stage_mesh: Callable) -> None:
    def fn(weights: Any, x: Any, key: Any) -> Any:
        x = x @ weights[0]
        mask, index = x > 0, jnp.argmax(x, axis=-1)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)
        x = jnp.tanh(jnp.tanh(x @ weights[1]) @ weights[2])
        noise = jax.vmap(lambda key: jax.random.normal(key, (WIDTH,)))(keys)
        return {
            "x": jnp.where(mask, x, noise) @ weights[3],
            "index": index,
            "mask": mask,
            "keys": keys,
        }

    weights = [layer["weight"] for layer in draw_layers()[:4]]
    case = regression(
        "crossing", fn, weights, draw_features(WIDTH), jax.random.key(3), in_axes=(0, None)
    )
    pipeline = stage_case(case, fn, stage_mesh(4), 2)
    got, want = jax.jit(pipeline)(pipeline.place(weights), *case.inputs), fn(weights, *case.inputs)
    assert got["keys"].dtype == want["keys"].dtype
    got, want = ({**out, "keys": jax.random.key_data(out["keys"])} for out in (got, want))
    assert_trees_close(got, want, case.tolerance)


def test_two_pipelines_in_one_program(stage_mesh: Callable) -> None:
    """Of different models, on overlapping devices, one after the other in one jit."""
    first, second = equal_layers(), CASES["custom_derivatives"]()
    pipelines = [
        stage_case(first, first.fn, stage_mesh(4), 4),
        stage_case(second, second.fn, stage_mesh(4), 2),
    ]
    staged = [
        pipeline.place(case.params)
        for pipeline, case in zip(pipelines, (first, second), strict=True)
    ]

    @compile_lightly
    def both(staged: Any, x: jax.Array) -> jax.Array:
        return pipelines[1](staged[1], pipelines[0](staged[0], x))

    want = second.fn(second.params, first.fn(first.params, *first.inputs))
    assert_trees_close(both(staged, *first.inputs), want, first.tolerance)
    assert_trees_close(
        pipelines[0](staged[0], *first.inputs),
        first.fn(first.params, *first.inputs),
        first.tolerance,
    )


def test_vmap_over_a_pipeline(stage_mesh: Callable) -> None:
    case = equal_layers()
    pipeline = stage_case(case, case.fn, stage_mesh(4), 4)
    several = jnp.stack([*case.inputs, -case.inputs[0], 2 * case.inputs[0]])
    got = compile_lightly(jax.vmap(pipeline, in_axes=(None, 0)))(
        pipeline.place(case.params), several
    )
    assert_trees_close(
        got, jax.vmap(case.fn, in_axes=(None, 0))(case.params, several), case.tolerance
    )


@pytest.mark.usefixtures("float64")
def test_a_train_step_that_donates_its_parameters(stage_mesh: Callable) -> None:
    """With tied weights, each copy of which is a buffer of its own."""
    case = widened(CASES["gpt"]())
    pipeline, optimizer = stage_case(case, case.loss_fn, stage_mesh(3), 4), optax.sgd(0.1)

    def step_of(value_and_grad: Callable) -> Callable:
        def step(params: Any, *inputs: Any) -> tuple[Any, Any]:
            loss, gradients = value_and_grad(params, *inputs)
            updates, _ = optimizer.update(gradients, optimizer.init(params))
            return optax.apply_updates(params, updates), loss

        return step

    train = compile_lightly(step_of(pipeline.value_and_grad), donate_argnums=0)
    unstaged = compile_lightly(step_of(jax.value_and_grad(case.loss_fn)))
    staged, params = pipeline.place(case.params), case.params
    for _ in range(2):
        before = staged
        staged, loss = train(staged, *case.inputs)
        params, want = unstaged(params, *case.inputs)
        assert all(slot.is_deleted() for slot in before.values())
        assert_trees_close(loss, want, STEPS_TOLERANCE)
    assert_trees_close(pipeline.gather(staged), params, STEPS_TOLERANCE)


@pytest.mark.parametrize("name", ["mlp", "jitted", "checkpointed"])
def test_gradients_by_the_caller(name: str, stage_mesh: Callable) -> None:
    """Of parameters and inputs, through the pipeline's forward loop."""
    case = CASES[name]()
    pipeline = stage_case(case, case.loss_fn, stage_mesh(4), 4)
    got = compile_lightly(jax.grad(pipeline, argnums=(0, 1)))(
        pipeline.place(case.params), *case.inputs
    )
    want = compile_lightly(jax.grad(case.loss_fn, argnums=(0, 1)))(case.params, *case.inputs)
    assert_trees_close((pipeline.gather(got[0]), got[1]), want, case.tolerance)


@pytest.mark.parametrize("name", ["gpt", "jitted", "gpt_dropout_keys"])
def test_replicas_split_the_batch(name: str, stage_mesh: Callable) -> None:
    case = CASES[name]()
    pipeline = stage_case(case, case.loss_and_outputs, stage_mesh(4, data=2), 2)
    got, gradients = compile_lightly(pipeline.value_and_grad)(
        pipeline.place(case.params), *case.inputs
    )
    want = compile_lightly(jax.value_and_grad(case.loss_and_outputs, has_aux=True))(
        case.params, *case.inputs
    )
    assert_trees_close((got, pipeline.gather(gradients)), want, case.tolerance)


def test_gradients_by_the_caller_with_replicas(stage_mesh: Callable) -> None:
    case = equal_layers()
    pipeline = stage_case(case, case.loss_fn, stage_mesh(4, data=2), 2)
    got = compile_lightly(jax.grad(pipeline, argnums=(0, 1)))(
        pipeline.place(case.params), *case.inputs
    )
    want = jax.grad(case.loss_fn, argnums=(0, 1))(case.params, *case.inputs)
    assert_trees_close((pipeline.gather(got[0]), got[1]), want, case.tolerance)


def test_counts_add_up_exactly(stage_mesh: Callable) -> None:
    """In their own dtype: these are too large for float32."""

    def fn(layers: Any, x: jax.Array, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.sum(tanh_chain(layers, x)), jnp.sum(counts)

    counts = jnp.full(BATCH, 2**24 + 1, jnp.int32)
    case = Case(
        "counts",
        fn,
        draw_layers(),
        (draw_features(WIDTH), counts),
        lambda out, *_: out[0],
        reduce="sum",
    )
    pipeline = stage_case(case, fn, stage_mesh(4), 4)
    staged = pipeline.place(case.params)
    _, forward = compile_lightly(pipeline)(staged, *case.inputs)
    (_, training), _ = compile_lightly(pipeline.value_and_grad)(staged, *case.inputs)
    assert int(forward) == int(training) == BATCH * (2**24 + 1)


def test_rows_come_back_spread_over_the_stages(stage_mesh: Callable) -> None:
    """Nothing gathers them that no one asked for; where they do not divide, every stage has all of
    them.
    """
    case = equal_layers()
    spread = stage_case(case, case.fn, stage_mesh(4), 4)
    output = jax.jit(spread)(spread.place(case.params), *case.inputs)
    assert output.sharding.is_equivalent_to(
        jax.NamedSharding(spread.mesh, PartitionSpec("stage")), output.ndim
    )
    assert {shard.data.shape for shard in output.addressable_shards} == {(BATCH // 4, WIDTH)}
    odd = stage_case(case, case.fn, stage_mesh(3), 4, even_boundaries)
    output = jax.jit(odd)(odd.place(case.params), *case.inputs)
    assert output.sharding.is_fully_replicated
