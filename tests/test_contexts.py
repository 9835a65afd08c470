"""Pipelines under contexts of JAX: meshes of the caller, Explicit axes, debug_nans, eager calls."""

import copy
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import layerwise_jax as lw

WIDTH, BATCH = 4, 8
PARAMS = [np.full((WIDTH, WIDTH), 0.1 * (i + 1), np.float32) for i in range(4)]
X = np.linspace(-1, 1, BATCH * WIDTH, dtype=np.float32).reshape(BATCH, WIDTH)
KINDS = [pytest.param(AxisType.Auto, marks=pytest.mark.slow), AxisType.Explicit]


def loss(params: list[Any], x: Any) -> Any:
    for weight in params:
        x = x + jnp.tanh(x @ weight)
    return jnp.mean(x**2), x


WANT = jax.value_and_grad(loss, has_aux=True)(PARAMS, X)


def mesh_of(kind: AxisType, **axes: int) -> Mesh:
    devices = np.array(jax.devices()[: int(np.prod(list(axes.values())))])
    return Mesh(devices.reshape(*axes.values()), tuple(axes), axis_types=(kind,) * len(axes))


def build(mesh: Mesh) -> lw.Pipeline:
    layers = lw.trace_layers(loss, PARAMS, X[: BATCH // 2 // mesh.shape.get("data", 1)])
    return lw.build_pipeline(layers, (0, 2, 4), mesh, 2, reduce="mean")


def close(got: Any, want: Any) -> None:
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6), got, want)


def check_calls(pipeline: lw.Pipeline, x: Any, *, jitted: bool = True) -> None:
    """Calls, gradients in both ways and a training step, jitted and eager."""
    staged = pipeline.place(PARAMS)
    ways: list[Callable[..., Any]] = [lambda fn: fn, *([jax.jit] if jitted else [])]
    for way in ways:
        close(way(pipeline)(staged, x), WANT[0])
        value, gradients = way(pipeline.value_and_grad)(staged, x)
        close((value, pipeline.gather(gradients)), WANT)
    if jitted:
        grad = jax.jit(jax.grad(lambda staged, x: 2 * pipeline(staged, x + 0)[0]))
        close(pipeline.gather(grad(staged, x)), jax.tree.map(lambda g: 2 * g, WANT[1]))
    step = pipeline.train_step(optax.sgd(1.0))
    trained, _, value = step(staged, step.init(staged), x)
    close(value, WANT[0])
    close(pipeline.gather(trained), jax.tree.map(lambda p, g: p - g, PARAMS, WANT[1]))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_context_mesh_over_the_same_devices(kind: AxisType) -> None:
    pipeline = build(mesh_of(AxisType.Auto, stage=2))
    with jax.set_mesh(mesh_of(kind, fsdp=2)):
        check_calls(pipeline, X)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_building_under_a_context_mesh(kind: AxisType) -> None:
    with jax.set_mesh(mesh_of(kind, fsdp=2)):
        pipeline = build(mesh_of(AxisType.Auto, stage=2))
        assert "stages" in str(lw.layerwise(loss, PARAMS, X, reduce="mean", num_stages=2).plan)
        close(jax.jit(pipeline)(pipeline.place(PARAMS), X), WANT[0])
    close(jax.jit(pipeline)(pipeline.place(PARAMS), X), WANT[0])


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_context_mesh_over_other_devices(kind: AxisType) -> None:
    """Calls that nothing traces run; JAX does not run a traced one, which is said."""
    pipeline = build(mesh_of(AxisType.Auto, stage=2))
    with jax.set_mesh(mesh_of(kind, fsdp=8)):
        check_calls(pipeline, X, jitted=False)
        with pytest.raises(ValueError, match=r"2 devices, got a mesh of 8 .*fsdp=8.*set_mesh\("):
            jax.jit(pipeline).lower(pipeline.place(PARAMS), X)


def test_an_explicit_mesh_of_the_pipeline() -> None:
    mesh = mesh_of(AxisType.Explicit, data=2, stage=2)
    pipeline = build(mesh)
    check_calls(pipeline, X)
    with jax.set_mesh(mesh):
        check_calls(pipeline, jax.device_put(X, NamedSharding(mesh, PartitionSpec("data"))))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_inputs_sharded_over_other_meshes(kind: AxisType) -> None:
    pipeline = build(mesh_of(AxisType.Auto, stage=2))
    x = jax.device_put(X, NamedSharding(mesh_of(kind, batch=2), PartitionSpec("batch")))
    check_calls(pipeline, x)
    on_others = jax.device_put(X, NamedSharding(mesh_of(kind, batch=4), PartitionSpec("batch")))
    check_calls(pipeline, on_others, jitted=False)
    check_calls(pipeline, jax.device_put(X, jax.devices()[3]), jitted=False)


def test_tracing_with_arrays_of_an_explicit_mesh() -> None:
    sharding = NamedSharding(mesh_of(AxisType.Explicit, fsdp=2), PartitionSpec("fsdp"))
    params, x = jax.device_put((PARAMS, X), sharding)
    pipeline = lw.layerwise(
        loss, params, x, reduce="mean", num_stages=2, num_microbatches=2, capacity=None
    )
    close(jax.jit(pipeline)(pipeline.place(params), x), WANT[0])


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """Names of what JAX compiles."""
    found: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("Compiling"):
                found.append(record.getMessage().split()[1])

    logger, handler = logging.getLogger("jax._src.interpreters.pxla"), Handler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield found
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_eager_calls_compile_once(compilations: list[str]) -> None:
    pipeline = build(mesh_of(AxisType.Auto, stage=2))
    staged = pipeline.place(PARAMS)
    for call in (pipeline, pipeline.value_and_grad):
        compilations.clear()
        call(staged, X)
        assert len(compilations) <= 2, compilations
        compilations.clear()
        call(staged, X + 1)
        assert compilations == []


@pytest.mark.parametrize("remat", ["stage", pytest.param(None, marks=pytest.mark.slow)])
def test_debug_nans_sees_none(remat: str | None) -> None:
    """Bubbles compute on finite values; a NaN of the function's own is found."""

    def fragile(params: list[Any], x: Any) -> Any:
        for weight in params:
            x = jnp.sqrt(x @ weight) / x  # NaN on zeros
        return jnp.mean(x)

    x = np.abs(X) + 1
    layers = lw.trace_layers(fragile, PARAMS, x[:2])
    mesh = mesh_of(AxisType.Auto, stage=2)
    pipeline = lw.build_pipeline(
        layers, (0, 2, 4), mesh, 4, reduce="mean", remat=remat, skip_bubbles=False
    )
    staged = pipeline.place(PARAMS)
    with jax.debug_nans(True):
        close(jax.jit(pipeline)(staged, x), fragile(PARAMS, x))
        value, gradients = jax.jit(pipeline.value_and_grad)(staged, x)
        close((value, pipeline.gather(gradients)), jax.value_and_grad(fragile)(PARAMS, x))
        with pytest.raises(FloatingPointError):
            jax.jit(pipeline)(staged, -x)


def test_inputs_by_name() -> None:
    pipeline = build(mesh_of(AxisType.Auto, stage=2))
    staged = pipeline.place(PARAMS)
    close(jax.jit(pipeline)(staged, x=X), WANT[0])
    close(pipeline.value_and_grad(staged, x=X)[0], WANT[0])
    with pytest.raises(ValueError, match="by name must be those of the function, got y"):
        pipeline(staged, y=X)


def test_copies_and_reprs_of_a_pipeline() -> None:
    pipeline = build(mesh_of(AxisType.Auto, stage=2))
    twin = copy.deepcopy({"pipeline": pipeline})["pipeline"]
    close(twin(twin.place(PARAMS), X), WANT[0])
    for value in (pipeline, pipeline.plan):
        assert "2 stages" in repr(value)
        assert len(repr(value)) < 300
        assert "\n" not in repr(value)


def test_profiles_name_stages_passes_and_messages() -> None:
    def unequal(params: list[Any], x: Any) -> Any:
        return jnp.mean(jnp.sin(loss(params, x * 2)[1]) ** 2)

    layers = lw.trace_layers(unequal, PARAMS, X[:4])
    mesh = mesh_of(AxisType.Auto, stage=2)
    pipeline = lw.build_pipeline(layers, (0, 1, 4), mesh, 2, reduce="mean")
    equal = build(mesh)
    scopes = {pipeline: ("forward", "backward", "send", "stage_0", "stage_1")}
    for staged, names in {**scopes, equal: ("stage_body",)}.items():
        lowered = jax.jit(staged.value_and_grad).lower(staged.place(PARAMS), X)
        text = lowered.as_text(debug_info=True)
        for name in names:
            assert re.search(rf"[/(]{name}[/)]", text), name
