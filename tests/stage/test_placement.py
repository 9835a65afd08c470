"""Placement: every weight on its own stage's device, and back."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import tree_leaves_with_path

from layerwise_jax._jax import is_key
from layerwise_jax.pipeline import Pipeline
from layerwise_jax.stage.placement import Placement
from tests.models.plain import dense, draw_layers, tanh_chain
from tests.models.zoo import CASES
from tests.support.staging import (
    STEPS_TOLERANCE,
    assert_trees_close,
    compile_lightly,
    even_boundaries,
    stage_case,
    widened,
)
from tests.support.zoo_case import WIDTH, Case, draw_features, regression


def mixed_types() -> Case:
    """Parameters of every kind: floats wide and narrow, integers, random keys, a stack used in
    rows, one unused.
    """
    params = {
        "layers": draw_layers()[:4],
        "narrow": jnp.asarray(
            np.random.default_rng(2).standard_normal((WIDTH, WIDTH)), jnp.bfloat16
        ),
        "order": jnp.asarray(np.random.default_rng(3).permutation(WIDTH), jnp.int32),
        "keys": jax.random.split(jax.random.key(7), 3),
        "stack": jnp.stack([layer["weight"] for layer in draw_layers()[4:]]),
        "unused": jnp.arange(5, dtype=jnp.uint8),
    }

    def fn(params: Any, x: jax.Array) -> jax.Array:
        for row in (0, 1, 3):
            x = jnp.tanh(x @ params["stack"][row])
        for layer in params["layers"]:
            x = jnp.tanh(dense(layer, x))
        x = x[:, params["order"]] @ params["narrow"].astype(jnp.float32)
        return x + jax.random.normal(params["keys"][1], (WIDTH,))

    return regression("mixed_types", fn, params, draw_features(WIDTH))


def assert_same_bits(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, x), y in zip(tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert x.dtype == y.dtype, path
        if is_key(x):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


MODELS: dict[str, Callable[[], Case]] = {
    "mixed_types": mixed_types,
    **{
        name: CASES[name]
        for name in ("gpt", "gpt_scan", "odd_outputs", "indexed", "shared_blocks", "nnx_mlp")
    },
}


@pytest.mark.parametrize("num_stages", [1, 3, 4])
@pytest.mark.parametrize("name", MODELS)
def test_gather_is_the_inverse_of_place(name: str, num_stages: int, stage_mesh: Callable) -> None:
    case = MODELS[name]()
    pipeline = stage_case(case, case.fn, stage_mesh(num_stages), 1)
    assert_same_bits(pipeline.gather(pipeline.place(case.params)), case.params)


def test_a_model_with_parameters_of_every_type_runs(stage_mesh: Callable) -> None:
    case = mixed_types()
    pipeline = stage_case(case, case.loss_and_outputs, stage_mesh(3), 4)
    staged = pipeline.place(case.params)
    (loss, outputs), gradients = compile_lightly(pipeline.value_and_grad)(staged, *case.inputs)
    assert_trees_close(
        (loss, outputs), case.loss_and_outputs(case.params, *case.inputs), case.tolerance
    )
    want = jax.grad(case.loss_fn, allow_int=True)(case.params, *case.inputs)
    assert {name for name, slot in gradients.items() if slot.dtype == jax.dtypes.float0} == {
        name for name, slot in staged.items() if not jnp.issubdtype(slot.dtype, jnp.floating)
    }
    got = pipeline.gather(gradients)
    assert_trees_close(got.pop("narrow"), want.pop("narrow"), 1e-2)
    assert_trees_close(got, want, case.tolerance)


def rows_by_device(placement: Placement, staged: Any) -> dict[Any, dict[str, np.ndarray]]:
    rows: dict[Any, dict[str, np.ndarray]] = {}
    for slot in placement.slots:
        for shard in staged[slot.name].addressable_shards:
            assert shard.data.shape == (1, *slot.aval.shape)
            rows.setdefault(shard.device, {})[slot.name] = np.asarray(shard.data[0])
    return rows


@pytest.mark.parametrize("ways", [{}, {"data": 2}])
def test_every_weight_is_on_its_own_stages_devices_only(
    ways: dict[str, int], stage_mesh: Callable
) -> None:
    case = CASES["gpt"]()
    pipeline = stage_case(case, case.fn, stage_mesh(4, **ways), 2)
    rows = rows_by_device(pipeline.placement, pipeline.place(case.params))
    assert set(rows) == set(pipeline.mesh.devices.flat)
    leaves = jax.tree.leaves(case.params)
    for s, devices in enumerate(pipeline.mesh.devices.reshape(4, -1)):
        read = set(pipeline.loop.stages[s].weights.values())
        for device in devices:
            for slot in pipeline.placement.slots:
                weight, row = slot.weights[s], rows[device][slot.name]
                assert weight is None or weight in read
                np.testing.assert_array_equal(
                    row, 0 * row if weight is None else weight.of(leaves[weight.leaf])
                )
        assert read == {slot.weights[s] for slot in pipeline.placement.slots} - {None}


def test_tied_weights_have_a_copy_on_each_of_their_stages(stage_mesh: Callable) -> None:
    case = CASES["gpt"]()
    placement = stage_case(case, case.fn, stage_mesh(4), 1).placement
    copies = {
        placement.signature.params_names[w.leaf]: [s for _, s in c]
        for w, c in placement.copies().items()
    }
    (embedding,) = [stages for name, stages in copies.items() if "Embed_0" in name]
    assert embedding == [0, 3]
    assert sum(len(stages) > 1 for stages in copies.values()) == 1


def test_padding_is_what_slots_hold_in_vain(stage_mesh: Callable) -> None:
    """All slots' bytes are the weights', a copy a stage that uses them, and the padding."""
    case = CASES["gpt"]()
    pipeline = stage_case(case, case.fn, stage_mesh(4), 1)
    held = sum(slot.nbytes for slot in pipeline.place(case.params).values())
    leaves = jax.tree.leaves(case.params)
    needed = sum(
        weight.of(leaves[weight.leaf]).nbytes * len(c)
        for weight, c in pipeline.placement.copies().items()
    )
    assert pipeline.placement.padding_bytes == held - needed > 0
    even = stage_case(CASES["jitted"](), CASES["jitted"]().fn, stage_mesh(4), 1)
    assert even.placement.padding_bytes == 0


def test_numpy_arrays_and_shapes_are_placed_too(stage_mesh: Callable) -> None:
    case = CASES["gpt_scan"]()
    pipeline = stage_case(case, case.fn, stage_mesh(3), 1)
    staged = pipeline.place(case.params)
    assert_same_bits(pipeline.place(jax.device_get(case.params)), staged)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), case.params)
    for name, shape in pipeline.place(shapes).items():
        assert (shape.shape, shape.dtype) == (staged[name].shape, staged[name].dtype)
        assert shape.sharding == staged[name].sharding
    jax.jit(pipeline).lower(pipeline.place(shapes), *case.inputs)


def test_placing_and_gathering_under_jit(stage_mesh: Callable) -> None:
    case = CASES["gpt_scan"]()
    pipeline = stage_case(case, case.fn, stage_mesh(3), 1)
    assert_same_bits(
        jax.jit(lambda params: pipeline.gather(pipeline.place(params)))(case.params), case.params
    )


def refused(pipeline: Pipeline, params: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline.place(params)


def test_other_parameters_than_the_traced_ones_are_refused(stage_mesh: Callable) -> None:
    case = CASES["jitted"]()
    pipeline, first = stage_case(case, case.fn, stage_mesh(2), 1, even_boundaries), case.params[0]
    refused(pipeline, case.params[:7], "must have the traced tree")
    refused(
        pipeline,
        [{**first, "bias": first["bias"][:3]}, *case.params[1:]],
        r"\[0\]\['bias'\] must be .* got float32\[3\]",
    )
    narrow = {**first, "weight": first["weight"].astype(jnp.bfloat16)}
    refused(pipeline, [narrow, *case.params[1:]], r"\[0\]\['weight'\] must be .* got bfloat16")
    staged = pipeline.place(case.params)
    with pytest.raises(ValueError, match=r"Call pipeline.place\(params\) first"):
        pipeline(case.params, *case.inputs)
    with pytest.raises(ValueError, match="got float32"):
        pipeline({name: slot[:1] for name, slot in staged.items()}, *case.inputs)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "optimizer", [optax.sgd(0.1, momentum=0.9), optax.adam(1e-2)], ids=["sgd", "adam"]
)
def test_optimisers_that_work_leaf_by_leaf_run_on_placed_parameters(
    optimizer: optax.GradientTransformation, stage_mesh: Callable
) -> None:
    """Three steps; the copies of tied weights stay equal."""
    case = regression(
        "tied",
        lambda layers, x: tanh_chain([*layers, *layers[:2]], x),
        draw_layers()[:4],
        draw_features(WIDTH),
    )
    case = widened(case)
    pipeline = stage_case(case, case.loss_fn, stage_mesh(3), 2)

    def train(value_and_grad: Callable, params: Any) -> Any:
        @compile_lightly
        def step(params: Any, state: Any) -> tuple[Any, Any]:
            _, gradients = value_and_grad(params, *case.inputs)
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        state = optimizer.init(params)
        for _ in range(3):
            params, state = step(params, state)
        return params

    staged = train(pipeline.value_and_grad, pipeline.place(case.params))
    want = train(jax.value_and_grad(case.loss_fn), case.params)
    assert_trees_close(pipeline.gather(staged), want, STEPS_TOLERANCE)
    names = [slot.name for slot in pipeline.placement.slots]
    tied = [places for places in pipeline.placement.copies().values() if len(places) > 1]
    assert len(tied) == 4
    for (j, s), (other, stage) in tied:
        np.testing.assert_array_equal(staged[names[j]][s], staged[names[other]][stage])
