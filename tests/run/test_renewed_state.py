"""State that no example touches: every microbatch reads the old value, a call renews it once."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import Mesh

import layerwise_jax as lw
from tests.support.staging import assert_trees_close, compile_lightly, even_boundaries

WIDTH, BATCH, TOLERANCE = 6, 8, 1e-5
X = jax.random.normal(jax.random.key(3), (BATCH, WIDTH))


def plain_params() -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(0), 4)
    return {
        "layers": [jax.random.normal(key, (WIDTH, WIDTH)) / 2 for key in keys],
        "count": jnp.zeros((), jnp.int32),  # read by every layer
        "decay": jnp.ones(()),  # read by the loss
        "key": jax.random.key(1),
        "average": jnp.zeros((WIDTH, WIDTH)),  # of a weight on the first stage; nothing reads it
    }


def plain(params: dict[str, Any], x: jax.Array) -> Any:
    key, new_key = jax.random.split(params["key"])
    for weight in params["layers"]:
        x = x + jnp.tanh(x @ weight) / (1 + params["count"])
    x = x * jax.random.bernoulli(key, 0.5, x.shape)
    state = {
        "count": params["count"] + 1,
        "decay": 0.5 * params["decay"],
        "key": new_key,
        "average": 0.9 * params["average"] + 0.1 * params["layers"][0],
    }
    return jnp.mean(x**2) * params["decay"], state


@dataclass(frozen=True)
class Layout:
    num_stages: int = 2
    microbatches: int = 4
    devices: int = 2
    data: int = 1
    executor: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


LAYOUTS = {
    "2 stages": Layout(),
    "one microbatch": Layout(microbatches=1),
    "2 replicas": Layout(microbatches=2, data=2),
    "4 stages on 2 devices": Layout(4, options={"schedule": "interleaved_1f1b"}),
    "stored residuals": Layout(4, 2, devices=4, options={"remat": None}),
    "executor host": Layout(executor="host"),
}


def stage(
    fn: Callable[..., Any],
    params: Any,
    layout: Layout,
    stage_mesh: Callable[..., Mesh],
    **more: Any,
) -> lw.Pipeline:
    parts = layout.microbatches * layout.data
    layers = lw.trace_layers(fn, params, X[: BATCH // parts])
    mesh = stage_mesh(layout.devices, data=layout.data)
    cut = even_boundaries(len(layers), layout.num_stages)
    options = {"reduce": "mean", **layout.options, **more}
    return lw.build_pipeline(layers, cut, mesh, layout.microbatches, **options)


SLOW = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("one microbatch", "2 replicas", "stored residuals")
]


@pytest.mark.parametrize("name", ["2 stages", "4 stages on 2 devices", "executor host", *SLOW])
def test_calls_and_steps_are_those_of_the_function(
    name: str, stage_mesh: Callable[..., Mesh]
) -> None:
    params, layout = plain_params(), LAYOUTS[name]
    pipeline = stage(plain, params, layout, stage_mesh, state=lambda out: out[1])
    light = compile_lightly if layout.executor is None else lambda fn: fn
    staged = pipeline.place(params, layout.executor)
    step = light(pipeline.value_and_grad)
    for _ in range(3):
        (loss, nothing), called = light(pipeline)(staged, X)
        ((trained_loss, _), staged), gradients = step(staged, X)
        (want, state), slopes = jax.value_and_grad(plain, has_aux=True, allow_int=True)(params, X)
        params = {**params, **state}
        assert jax.tree.leaves(nothing) == []
        assert_trees_close([loss, trained_loss], [want, want], TOLERANCE)
        for after in (called, staged):
            assert_trees_close(data(pipeline.gather(after)), data(params), TOLERANCE)
        assert_trees_close(pipeline.gather(gradients)["layers"], slopes["layers"], TOLERANCE)


def data(params: dict[str, Any]) -> dict[str, Any]:
    return {**params, "key": jax.random.key_data(params["key"])}


class Dropping(nnx.Module):
    """Dropout after every layer, from one stream of keys, and optionally batch statistics."""

    def __init__(self, rngs: nnx.Rngs, *, normed: bool = False):
        self.layers = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(4)])
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs) if normed else None

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = self.drop(jnp.tanh(layer(x)))
        return x if self.norm is None else self.norm(x)


def loss_of(model: Dropping, x: jax.Array) -> jax.Array:
    return jnp.mean(model(x) ** 2)


@pytest.mark.parametrize(
    "name", ["2 stages", pytest.param("executor host", marks=pytest.mark.slow), SLOW[1]]
)
def test_an_nnx_module_is_updated_as_by_nnx_jit(name: str, stage_mesh: Callable[..., Mesh]) -> None:
    """Values, gradients, masks and counts of three steps."""
    model, reference = Dropping(nnx.Rngs(0)), Dropping(nnx.Rngs(0))
    layout = LAYOUTS[name]
    pipeline = stage(loss_of, model, layout, stage_mesh, state="mutated")
    light = compile_lightly if layout.executor is None else lambda fn: fn
    step, unstaged = light(pipeline.value_and_grad), nnx.jit(nnx.value_and_grad(loss_of))
    staged, losses = pipeline.place(model, layout.executor), []
    for _ in range(3):
        (loss, staged), gradients = step(staged, X)
        want, slopes = unstaged(reference, X)
        losses.append(float(loss))
        assert_trees_close(loss, want, TOLERANCE)
        got = nnx.state(pipeline.gather(gradients), nnx.Param)
        assert_trees_close(nnx.to_pure_dict(got), nnx.to_pure_dict(slopes), TOLERANCE)
        counts = nnx.state(pipeline.gather(staged), nnx.RngCount)
        want = nnx.state(reference, nnx.RngCount)
        assert nnx.to_pure_dict(counts) == nnx.to_pure_dict(want)
    assert len(set(losses)) == 3
    assert int(pipeline.gather(staged).drop.rngs.count[...]) == 12


def test_batch_statistics_of_an_nnx_module_beside_counts(stage_mesh: Callable[..., Mesh]) -> None:
    """One microbatch is the batch, so the statistics are nnx.jit's; counts are for any number."""
    model, reference = Dropping(nnx.Rngs(0), normed=True), Dropping(nnx.Rngs(0), normed=True)
    pipeline = stage(
        loss_of,
        model,
        LAYOUTS["one microbatch"],
        stage_mesh,
        state="mutated",
        batch_statistics="per_microbatch",
    )
    staged, call = pipeline.place(model), compile_lightly(pipeline)
    for _ in range(3):
        loss, staged = call(staged, X)
        assert_trees_close(loss, nnx.jit(loss_of)(reference, X), TOLERANCE)
    got, want = (
        nnx.state(m, (nnx.BatchStat, nnx.RngCount)) for m in (pipeline.gather(staged), reference)
    )
    assert_trees_close(nnx.to_pure_dict(got), nnx.to_pure_dict(want), TOLERANCE)


def test_what_a_module_mutates_is_named() -> None:
    options = {"num_stages": 2, "num_microbatches": 2, "capacity": None, "reduce": "mean"}
    model = Dropping(nnx.Rngs(0), normed=True)
    with pytest.raises(ValueError, match=r"mutates .*\.drop\.rngs\.count.*state='mutated'"):
        lw.layerwise(loss_of, model, X, **options)
    with pytest.raises(ValueError, match=r"mutates .*\.norm\.mean"):
        lw.layerwise(loss_of, model, X, batch_statistics="per_microbatch", **options)

    def returning_counts(model: Dropping, x: jax.Array) -> Any:
        return loss_of(model, x), nnx.state(model, nnx.RngCount)

    with pytest.raises(ValueError, match=r"must pick outputs under the paths"):
        lw.layerwise(returning_counts, model, X, state=lambda out: out[1], **options)
    with pytest.raises(ValueError, match="mutates none"):
        lw.layerwise(plain, plain_params(), X, state="mutated", **options)


def test_a_step_of_a_ring_that_mutates_its_module() -> None:
    model = Dropping(nnx.Rngs(0))

    def step(model: Dropping, cache: jax.Array, tokens: jax.Array, positions: jax.Array) -> Any:
        cache = cache + model(jax.nn.one_hot(tokens, WIDTH))
        return cache, cache

    cache = jnp.zeros((2, WIDTH))
    with pytest.raises(ValueError, match=r"new values of \.drop\.rngs\.count"):
        lw.decode_ring(step, model, cache, group_size=2, num_groups=2, num_stages=2)


def test_variables_where_jax_would_make_two_of_one() -> None:
    model = Dropping(nnx.Rngs(0))
    model.layers[2].kernel = model.layers[0].kernel
    with pytest.raises(ValueError, match=r"\.layers\[0\]\.kernel and \.layers\[2\]\.kernel.*split"):
        lw.trace_layers(loss_of, model, X)


def test_variables_that_are_added_or_are_inputs() -> None:
    class Sowing(Dropping):
        def __call__(self, x: jax.Array) -> jax.Array:
            x = super().__call__(x)
            self.extra = nnx.Variable(x)
            return x

    with pytest.raises(ValueError, match=r"it adds \.extra"):
        lw.trace_layers(loss_of, Sowing(nnx.Rngs(0)), X)

    def with_rngs(params: Any, x: jax.Array, rngs: nnx.Rngs) -> jax.Array:
        return x @ params * jax.random.uniform(rngs.dropout(), x.shape)

    with pytest.raises(ValueError, match=r"must not mutate its inputs.*count"):
        lw.trace_layers(with_rngs, jnp.eye(WIDTH), X, nnx.Rngs(0))
