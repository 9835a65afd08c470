"""Executor `host` on a small model: every schedule and policy, errors, what is shared and kept."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import layerwise_jax as lw
from layerwise_jax.host.column_run import ColumnRun
from layerwise_jax.host.executor import HostExecutor
from layerwise_jax.pipeline import Pipeline
from layerwise_jax.schedule import SCHEDULES, Schedule, ScheduleError, defer, one_f_one_b
from tests.host import models
from tests.support.host import LIGHT

PARAMS, BATCH = models.init(), models.batch()


@cache
def unstaged() -> Any:
    run = jax.value_and_grad(models.loss, has_aux=True, allow_int=True)
    return jax.device_get(run(PARAMS, *BATCH))


def build(mesh: Mesh, num_microbatches: int = 4, num_stages: int = 3, **options: Any) -> Pipeline:
    rows = models.BATCH // num_microbatches // mesh.shape.get("data", 1)
    layers = lw.trace_layers(models.loss, PARAMS, *(x[:rows] for x in BATCH))
    boundaries = [round(s * len(layers) / num_stages) for s in range(num_stages + 1)]
    options = {"reduce": "mean", "executor": "host", "xla_options": LIGHT, **options}
    return lw.build_pipeline(layers, boundaries, mesh, num_microbatches, **options)


def check_step(pipeline: Pipeline, wanted: Any = None) -> None:
    """Two steps, by one thread and by many, equal each other bit by bit, and the unstaged one."""
    staged = pipeline.place(PARAMS)
    (want, want_grads) = wanted or unstaged()
    first, second = (
        jax.device_get((value, pipeline.gather(grads)))
        for value, grads in (pipeline.value_and_grad(staged, *BATCH) for _ in range(2))
    )
    jax.tree.map(np.testing.assert_array_equal, first, second)
    value, grads = second
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), value, want)
    for name, grad in want_grads.items():
        assert grads[name].dtype == grad.dtype, name
        if grad.dtype != jax.dtypes.float0:
            np.testing.assert_allclose(grads[name], grad, rtol=1e-5, atol=1e-6, err_msg=name)


# A V: stage 0 and 3 on device 0, 1 and 2 on device 1. Executor `loop` does not run it.
V_SHAPE = """
0F0  .
0F1  1F0
.    2F0
3F0  1F1
3B0  2F1
3F1  2B0
3B1  1B0
0B0  2B1
.    1B1
0B1  .
"""


@pytest.mark.parametrize("remat", [None, "cheap", "stage"])
def test_policies(remat: Any, stage_mesh: Callable[..., Mesh]) -> None:
    check_step(build(stage_mesh(3), remat=remat))


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_schedules(schedule: Any, stage_mesh: Callable[..., Mesh]) -> None:
    """Every schedule of the registry; those with several stages a device on two devices."""
    several = SCHEDULES[schedule].stages_per_device != 1
    mesh, num_stages = stage_mesh(2), 4 if several else 2
    check_step(build(mesh, num_stages=num_stages, schedule=schedule, remat=None))


def test_deferred_weight_gradients(stage_mesh: Callable[..., Mesh]) -> None:
    schedule = defer(one_f_one_b(3, 4), [0, 1, 2])
    check_step(build(stage_mesh(3), schedule=schedule, remat=None))


def test_a_schedule_of_the_users_in_a_v(stage_mesh: Callable[..., Mesh]) -> None:
    schedule = Schedule.parse(V_SHAPE)
    check_step(build(stage_mesh(2), 2, num_stages=4, schedule=schedule, remat=None))


def test_one_stage(stage_mesh: Callable[..., Mesh]) -> None:
    check_step(build(stage_mesh(1), num_stages=1, remat=None))


def test_frozen_weights_have_no_gradient(stage_mesh: Callable[..., Mesh]) -> None:
    trained = {"third", "scale"}
    mask = {name: name in trained for name in PARAMS}
    pipeline = build(stage_mesh(3), trainable=mask, remat=None)
    value, grads = unstaged()
    float0 = {n: np.zeros(g.shape, jax.dtypes.float0) for n, g in grads.items() if n not in trained}
    check_step(pipeline, (value, {**grads, **float0}))
    kinds = {kind for stage, kind in pipeline.host_executor.library.programs if stage == 0}
    assert kinds == {"F"}, "a stage before all trained weights has no backward"


def test_memory_is_that_of_the_schedule(stage_mesh: Callable[..., Mesh]) -> None:
    """1F1B holds as much for many microbatches as for few, GPipe all of them."""
    rows = 2  # of a microbatch, so that only their number differs
    layers = lw.trace_layers(models.loss, PARAMS, *(x[:rows] for x in BATCH))
    held = {}
    for name, count in itertools.product(("1f1b", "gpipe"), (4, 8)):
        options = {"reduce": "mean", "executor": "host", "xla_options": LIGHT, "remat": None}
        pipeline = lw.build_pipeline(
            layers, [0, 3, len(layers)], stage_mesh(2), count, schedule=name, **options
        )
        held[name, count] = pipeline.host_executor.memory()[0].held
    assert held["1f1b", 8] == held["1f1b", 4] > 0
    assert held["gpipe", 8] == 2 * held["gpipe", 4] > 2 * held["1f1b", 4]


def test_evaluation_equals_training(stage_mesh: Callable[..., Mesh]) -> None:
    pipeline = build(stage_mesh(3))
    value, _ = unstaged()
    got = [jax.device_get(pipeline(pipeline.place(PARAMS), *BATCH)) for _ in range(2)]
    for each in got:
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), each, value)


def test_either_executor_by_the_layout_of_the_parameters(stage_mesh: Callable[..., Mesh]) -> None:
    pipeline = build(stage_mesh(3))
    by_loop = jax.jit(pipeline.value_and_grad)(pipeline.place(PARAMS, "loop"), *BATCH)
    by_host = pipeline.value_and_grad(pipeline.place(PARAMS, "host"), *BATCH)
    for (value, grads), (other, other_grads) in [(by_loop, by_host)]:
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), value, other)
        assert jax.tree.map(lambda x: x.sharding.spec, value) == jax.tree.map(
            lambda x: x.sharding.spec, other
        ), "callers cannot tell the executors apart"
        one, two = pipeline.gather(grads), pipeline.gather(other_grads)
        np.testing.assert_allclose(one["table"], two["table"], rtol=1e-5, atol=1e-6)


def test_copies_of_a_tied_weight_have_equal_gradients(stage_mesh: Callable[..., Mesh]) -> None:
    pipeline = build(stage_mesh(3))
    _, grads = pipeline.value_and_grad(pipeline.place(PARAMS), *BATCH)
    copies = [np.asarray(grads[name]) for name in grads if name.startswith("table")]
    assert len(copies) == 2
    np.testing.assert_array_equal(*copies)


def test_the_timeline_has_every_step(stage_mesh: Callable[..., Mesh]) -> None:
    pipeline = build(stage_mesh(3), remat=None)
    executor = pipeline.host_executor
    timeline = executor.timeline(pipeline.place(PARAMS), BATCH)
    steps = sorted(step for column in executor.program.columns for step in column)
    assert sorted(call.step for call in timeline.calls) == steps
    assert all(0 < call.host_seconds <= call.seconds for call in timeline.calls)
    longest = max(timeline.seconds(s, ("F",)) + timeline.seconds(s, ("B",)) for s in range(2))
    assert timeline.simulation.makespan >= 4 * longest  # four microbatches, one after the other
    assert "makespan" in str(timeline)


def test_auto_takes_the_loop_unless_it_cannot(stage_mesh: Callable[..., Mesh]) -> None:
    """On emulated devices, which share a processor."""
    for options, executor in [
        ({}, "loop"),
        ({"remat": "cheap"}, "loop"),
        ({"schedule": "zb_v", "num_stages": 4}, "host"),
    ]:
        pipeline = build(stage_mesh(2), **{"num_stages": 2, "executor": "auto", **options})
        assert pipeline.options.executor == executor, options


def test_several_processes_run_the_loop(
    stage_mesh: Callable[..., Mesh], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerwise_jax.processes.are_of_several", lambda devices: True)
    with pytest.raises(ValueError, match="executor must be 'loop' on a mesh over several"):
        build(stage_mesh(2), num_stages=2).place(PARAMS)
    chosen = build(stage_mesh(2), num_stages=2, remat="cheap", executor="auto")
    assert chosen.options.executor == "loop"


def test_tracing_is_refused(stage_mesh: Callable[..., Mesh]) -> None:
    pipeline = build(stage_mesh(3))
    staged = pipeline.place(PARAMS)
    with pytest.raises(ValueError, match=r"must not be traced.*executor='loop'"):
        jax.jit(pipeline.value_and_grad)(staged, *BATCH)
    with pytest.raises(ValueError, match="must not be traced"):
        jax.grad(lambda staged: pipeline(staged, *BATCH)[0], allow_int=True)(staged)


def test_forwards_of_a_stage_with_state_keep_their_order(stage_mesh: Callable[..., Mesh]) -> None:
    text = "0F1\n0F0\n0B1\n0B0"

    def counted(params: Any, x: Any) -> Any:
        return (x @ params["w"]).mean() * params["n"], {"n": params["n"] + x.sum()}

    params, x = {"w": np.ones((4, 4), np.float32), "n": np.float32(1)}, np.ones((4, 4), np.float32)
    layers = lw.trace_layers(counted, params, x[:2])
    pipeline = lw.build_pipeline(
        layers,
        [0, len(layers)],
        stage_mesh(1),
        2,
        reduce="mean",
        state=lambda out: out[1],
        batch_statistics="per_microbatch",
        schedule=Schedule.parse(text),
        executor="host",
    )
    with pytest.raises(ScheduleError, match="0F0 after 0F1"):
        pipeline.value_and_grad(pipeline.place(params), x)


@pytest.mark.parametrize("kind", ["FB", "B", "F"])
def test_a_failure_names_the_step_and_leaves_parameters(
    kind: str, stage_mesh: Callable[..., Mesh], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All columns end, whichever of them fails, and the next step is right."""
    pipeline = build(stage_mesh(3), remat=None)
    staged = pipeline.place(PARAMS)
    pipeline.value_and_grad(staged, *BATCH)  # from here on, columns have threads
    stage = {"FB": 2, "B": 1, "F": 0}[kind]
    program = pipeline.host_executor.library.programs[stage, kind]
    calls = []

    def failing(*arguments: Any) -> Any:
        calls.append(None)
        if len(calls) == 3:
            raise RuntimeError("out of something")
        return program(*arguments)

    monkeypatch.setitem(pipeline.host_executor.library.programs, (stage, kind), failing)
    with pytest.raises(RuntimeError, match="out of something") as caught:
        pipeline.value_and_grad(staged, *BATCH)
    assert f"stage {stage}" in caught.value.__notes__[0]
    assert "microbatch 2" in caught.value.__notes__[0]
    monkeypatch.undo()
    check_step(pipeline)


def test_threads_end_with_their_executor(stage_mesh: Callable[..., Mesh]) -> None:
    before = set(threading.enumerate())
    pipeline = build(stage_mesh(3))
    staged = pipeline.place(PARAMS)
    for _ in range(2):
        pipeline.value_and_grad(staged, *BATCH)
    columns = {t for t in set(threading.enumerate()) - before if t.name.startswith("lw-column-")}
    assert {t.name for t in columns} == {"lw-column-0", "lw-column-1", "lw-column-2"}
    pipeline.host_executor._workers.close()
    for thread in columns:
        thread.join()
    assert not any(t.is_alive() for t in columns)


def test_any_pace_of_the_threads_gives_the_same_bits(
    stage_mesh: Callable[..., Mesh], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = build(stage_mesh(3), remat=None)
    staged = pipeline.place(PARAMS)
    want = jax.device_get(pipeline.value_and_grad(staged, *BATCH))
    random, run = np.random.default_rng(0), ColumnRun.run

    def slow(self: ColumnRun, step: Any) -> None:
        time.sleep(random.uniform(0, 0.003))
        run(self, step)

    monkeypatch.setattr(ColumnRun, "run", slow)
    for _ in range(5):
        jax.tree.map(
            np.testing.assert_array_equal,
            jax.device_get(pipeline.value_and_grad(staged, *BATCH)),
            want,
        )


def test_float64_is_exact_to_its_own_rounding(stage_mesh: Callable[..., Mesh]) -> None:
    with jax.enable_x64(True):
        params = models.init(dtype="float64")
        layers = lw.trace_layers(models.loss, params, *(x[:2] for x in BATCH))
        pipeline = lw.build_pipeline(
            layers, [0, 2, 4, len(layers)], stage_mesh(3), 4, reduce="mean", executor="host"
        )
        run = jax.value_and_grad(models.loss, has_aux=True, allow_int=True)
        (want, _), want_grads = run(params, *BATCH)
        staged = pipeline.place(params)
        for _ in range(2):
            (value, _), grads = pipeline.value_and_grad(staged, *BATCH)
            grads = pipeline.gather(grads)
            np.testing.assert_allclose(value, want, rtol=1e-12)
            for name in ("table", "first", "second", "third", "scale"):
                np.testing.assert_allclose(grads[name], want_grads[name], rtol=1e-12, atol=1e-14)


def test_weight_gradients_add_up_in_float32(stage_mesh: Callable[..., Mesh]) -> None:
    """A float32 weight that is cast to bfloat16 has a gradient that was never rounded to it."""
    random = np.random.default_rng(0)
    params = {"w": jnp.asarray(random.standard_normal((16, 16)), jnp.float32)}
    x = jnp.asarray(random.standard_normal((8, 16)), jnp.bfloat16)

    def loss(params: Any, x: Any) -> Any:
        return jnp.mean((x @ params["w"].astype(jnp.bfloat16)).astype(jnp.float32))

    layers = lw.trace_layers(loss, params, x[:2])
    pipeline = lw.build_pipeline(
        layers, [0, len(layers)], stage_mesh(1), 4, reduce="mean", executor="host", remat=None
    )
    exact = jax.grad(lambda w: jnp.mean(x.astype(jnp.float32) @ w))(params["w"])
    errors = {}
    for widens in (False, True):
        program = replace(pipeline.host_executor.program, widens=widens)
        executor = HostExecutor(program)
        _, grads, _ = executor.value_and_grad(executor.placement.place(params), [x])
        grad = executor.placement.gather(grads)["w"]
        assert grad.dtype == jnp.float32
        errors[widens] = float(jnp.abs(grad - exact).max() / jnp.abs(exact).max())
    assert errors[True] < 1e-6 < errors[False]


def test_without_threads(stage_mesh: Callable[..., Mesh]) -> None:
    pipeline = build(stage_mesh(2), num_stages=2)
    executor = HostExecutor(pipeline.host_executor.program, threads=False)
    staged = executor.placement.place(PARAMS)
    one, two = (jax.device_get(executor.value_and_grad(staged, BATCH)[1]) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert "_workers" not in vars(executor)


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
def test_replicas_sum_gradients_once_a_step(schedule: Any, stage_mesh: Callable[..., Mesh]) -> None:
    """Backward has no collective: gradients are summed over replicas after the last microbatch."""
    mesh = stage_mesh(2, data=2)
    pipeline = build(mesh, 2, num_stages=2, schedule=schedule, remat=None)
    check_step(pipeline)
    executor = pipeline.host_executor
    texts = {key: program.as_text() for key, program in executor.library.programs.items()}
    assert len(texts) > 2
    for key, text in texts.items():
        assert "all-reduce" not in text, key
        assert "all-gather" not in text, key
