"""Training by a schedule: the gradients are those of the unstaged loss, and memory is bounded by
the stash.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from layerwise_jax.build import build_pipeline
from layerwise_jax.schedule.deferral import defer
from layerwise_jax.schedule.generators import one_f_one_b
from layerwise_jax.schedule.table import Schedule, ScheduleError
from layerwise_jax.trace.layers import trace_layers
from tests.models.zoo import CASES
from tests.support.staging import (
    STEPS_TOLERANCE,
    assert_trees_close,
    compile_lightly,
    even_boundaries,
    in_float64,
    stage_case,
    uneven_boundaries,
)

TOLERANCE = 2e-6


@functools.cache
def unstaged(name: str) -> tuple[Any, Any]:
    case = CASES[name]()
    return jax.device_get(
        compile_lightly(jax.value_and_grad(case.loss_fn))(case.params, *case.inputs)
    )


def check(
    name: str, mesh: Any, num_microbatches: int, cut: Callable = even_boundaries, **options: Any
) -> None:
    case = CASES[name]()
    pipeline = stage_case(case, case.loss_fn, mesh, num_microbatches, cut, **options)
    value, grads = compile_lightly(pipeline.value_and_grad)(
        pipeline.place(case.params), *case.inputs
    )
    assert_trees_close(
        (value, pipeline.gather(grads)), unstaged(name), max(case.tolerance, TOLERANCE)
    )


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize(("num_stages", "num_microbatches"), [(4, 2), (4, 4), (2, 8), (1, 4)])
def test_gradients_under_each_schedule(
    schedule: str, num_stages: int, num_microbatches: int, stage_mesh: Callable
) -> None:
    """Microbatches fewer than, as many as, and more than stages."""
    check("jitted", stage_mesh(num_stages), num_microbatches, schedule=schedule)


@pytest.mark.parametrize("name", ["unet", "shared_blocks", "mlp", "odd_outputs"])
def test_nothing_leaks_out_of_bubbles(name: str, stage_mesh: Callable) -> None:
    """Skips across stages, a weight tied across three, uneven stages: with NaN in every idle tick
    and empty slot.
    """
    check(name, stage_mesh(4), 4, uneven_boundaries, bubble_fill=math.nan)


@pytest.mark.parametrize(
    ("num_stages", "options"),
    [(4, {}), (4, {"remat": None}), (8, {"schedule": "interleaved_1f1b", "remat": None})],
)
def test_replicas_add_their_gradients(
    num_stages: int, options: dict[str, Any], stage_mesh: Callable
) -> None:
    def cut(num_layers: int, _: int) -> tuple[int, ...]:
        return even_boundaries(num_layers, num_stages)

    check("indexed", stage_mesh(4, data=2), 2, cut, **options)


def test_a_table_of_the_users_own(stage_mesh: Callable) -> None:
    table = Schedule.parse(str(one_f_one_b(2, 4)))
    check("jitted", stage_mesh(2), 4, schedule=table)
    with pytest.raises(ValueError, match="4 microbatches"):
        check("jitted", stage_mesh(2), 8, schedule=table)
    with pytest.raises(ScheduleError):
        check("jitted", stage_mesh(2), 4, schedule=Schedule.parse(str(table).replace("1B3", ".")))
    with pytest.raises(ValueError, match="'dualpipe_v' or a Schedule"):
        check("jitted", stage_mesh(2), 4, schedule="fastest")


@pytest.mark.parametrize("schedule", ["looped_bfs", "interleaved_zero_bubble"])
def test_gradients_with_two_stages_a_device(schedule: str, stage_mesh: Callable) -> None:
    check("jitted", stage_mesh(2), 4, num_stages=4, schedule=schedule)


def test_gradients_with_deferred_weight_gradients(stage_mesh: Callable) -> None:
    check("jitted", stage_mesh(2), 4, schedule=defer(one_f_one_b(2, 4, paired=True), [2, 1]))


def test_v_shaped_schedules_are_refused_by_the_loop(stage_mesh: Callable) -> None:
    with pytest.raises(ValueError, match=r"must place stage 2 on device 0 .*executor='host'"):
        check("jitted", stage_mesh(2), 4, num_stages=4, schedule="zb_v", executor="loop")


def deep_mlp(width: int = 32, depth: int = 8) -> tuple[Callable, list[jax.Array]]:
    params = [
        jnp.asarray(np.random.default_rng(i).normal(size=(width, width)) / width)
        for i in range(depth)
    ]

    def loss(params: list[jax.Array], x: jax.Array) -> jax.Array:
        for weight in params:
            x = jnp.tanh(x @ weight)
        return jnp.mean(x**2)

    return loss, params


def temporary_bytes(
    schedule: Any, num_microbatches: int, mesh: Any, remat: Any = "stage", step: int = 2
) -> int:
    """Workspace of one device's step, `step` layers a stage; its arguments are not in it."""
    loss, params = deep_mlp()
    rows = 64
    layers = trace_layers(loss, params, jax.ShapeDtypeStruct((rows, 32), jnp.float32))
    pipeline = build_pipeline(
        layers,
        range(0, 9, step),
        mesh,
        num_microbatches,
        reduce="mean",
        schedule=schedule,
        remat=remat,
    )
    x = jax.ShapeDtypeStruct((rows * num_microbatches, 32), jnp.float32)
    compiled = jax.jit(pipeline.value_and_grad).lower(pipeline.place(params), x).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    ("schedule", "remat", "num_devices", "step"),
    [
        ("1f1b", "stage", 4, 2),
        ("1f1b", None, 4, 2),
        ("zero_bubble", None, 4, 2),
        ("interleaved_1f1b", "stage", 4, 1),
    ],
)
def test_memory_is_bounded_by_the_stash(
    schedule: str, remat: str | None, num_devices: int, step: int, stage_mesh: Callable
) -> None:
    """It does not grow with the microbatches."""
    mesh = stage_mesh(num_devices)
    few, many = (temporary_bytes(schedule, m, mesh, remat, step) for m in (8, 64))
    assert many <= 1.05 * few


def test_gpipe_holds_all_microbatches(stage_mesh: Callable) -> None:
    """What arrived, where stages are run again; what their layers made too, where residuals are
    stored.
    """
    activation, mesh = 64 * 32 * 4, stage_mesh(4)
    for remat, least in (("stage", 0.9), (None, 1.8)):
        grown = temporary_bytes("gpipe", 64, mesh, remat) - temporary_bytes("gpipe", 8, mesh, remat)
        assert grown >= least * 56 * activation


def test_frozen_weights_have_no_gradient(stage_mesh: Callable) -> None:
    """Nor an accumulator, where no trained weight stands at their place; the others' gradients are
    unchanged.
    """
    loss, params = deep_mlp()
    x = jnp.asarray(np.random.default_rng(9).normal(size=(16, 32)), jnp.float32)
    layers = trace_layers(loss, params, x[:4])
    want = jax.grad(loss)(params, x)
    for trained in ([i % 2 == 1 for i in range(8)], [i > 2 for i in range(8)]):
        pipeline = build_pipeline(
            layers,
            (0, 2, 4, 6, 8),
            stage_mesh(4),
            4,
            reduce="mean",
            trainable=trained,
            bubble_fill=math.nan,
        )
        assert pipeline.trainable == tuple(trained)
        grads = pipeline.gather(
            compile_lightly(pipeline.value_and_grad)(pipeline.place(params), x)[1]
        )
        for is_trained, got, expected in zip(trained, grads, want, strict=True):
            if is_trained:
                assert_trees_close(got, expected, TOLERANCE)
            else:
                assert got.dtype == jax.dtypes.float0 or not np.any(got)
    with pytest.raises(ValueError, match="trainable must be a tree"):
        build_pipeline(layers, (0, 4, 8), stage_mesh(2), 4, reduce="mean", trainable=[True])
    with pytest.raises(ValueError, match=r"True or False .* got 1"):
        build_pipeline(
            layers,
            (0, 4, 8),
            stage_mesh(2),
            4,
            reduce="mean",
            trainable=lambda tree: [1 for _ in tree],
        )


def test_stages_go_round_the_devices_evenly(stage_mesh: Callable) -> None:
    with pytest.raises(ValueError, match=r"num_stages must be a multiple of the 2 .* got 3"):
        check(
            "jitted",
            stage_mesh(2),
            2,
            lambda n, _: even_boundaries(n, 3),
            schedule="interleaved_1f1b",
        )
    with pytest.raises(ValueError, match=r"remat must be .* got 'layer'"):
        check("jitted", stage_mesh(2), 2, remat="layer")


@pytest.mark.usefixtures("float64")
def test_optimisers_that_work_leaf_by_leaf_follow_the_unstaged_run(stage_mesh: Callable) -> None:
    loss, params = deep_mlp()
    params = in_float64(params)
    x = jnp.asarray(np.random.default_rng(9).normal(size=(16, 32)))
    layers = trace_layers(loss, params, x[:4])
    pipeline = build_pipeline(layers, (0, 3, 4, 8), stage_mesh(3), 4, reduce="mean")
    optimizer = optax.adamw(1e-2)

    def trained(value_and_grad: Callable, params: Any) -> Any:
        state = optimizer.init(params)
        step = compile_lightly(value_and_grad)
        for _ in range(5):
            _, grads = step(params, x)
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params

    staged = trained(pipeline.value_and_grad, pipeline.place(params))
    want = trained(jax.value_and_grad(loss), params)
    assert_trees_close(pipeline.gather(staged), want, STEPS_TOLERANCE)


def test_a_loss_without_data_counts_once(stage_mesh: Callable) -> None:
    """The gradient of what every microbatch has in common is not that of as many of them."""
    scale = jnp.arange(1.0, 5.0)

    def loss(params: list[jax.Array], x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.sum(params[0] ** 2), jnp.tanh(x * params[0]) * params[1]

    layers = trace_layers(loss, [scale, scale], jnp.ones((2, 4)))
    pipeline = build_pipeline(layers, (0, len(layers)), stage_mesh(1), 4)
    (value, _), grads = pipeline.value_and_grad(pipeline.place([scale, scale]), jnp.ones((8, 4)))
    np.testing.assert_allclose(value, jnp.sum(scale**2))
    np.testing.assert_allclose(pipeline.gather(grads)[0], 2 * scale, rtol=1e-6)


def test_a_loss_is_wanted(stage_mesh: Callable) -> None:
    case = CASES["jitted"]()
    pipeline = stage_case(case, case.fn, stage_mesh(2), 2)
    with pytest.raises(ValueError, match="must be a floating-point scalar"):
        pipeline.value_and_grad(pipeline.place(case.params), *case.inputs)
