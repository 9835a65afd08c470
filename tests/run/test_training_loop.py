"""The training loop's program, read from its jaxpr: casts, messages and gradients of a tick."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Jaxpr, JaxprEqn

from layerwise_jax.build import build_pipeline
from layerwise_jax.run import ticks, vjp
from layerwise_jax.run.casts import CastProgram
from layerwise_jax.trace.layers import trace_layers
from tests.support.hlo_text import loop_bodies, read_module
from tests.support.staging import assert_trees_close

WIDTH, ROWS, NUM_STAGES, NUM_MICROBATCHES = 6, 3, 3, 4
HALF = jnp.bfloat16


def draw(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape) / 3, jnp.float32)


def mixed_precision_loss(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """Products in bfloat16; biases in float32; one weight is read twice, once uncast."""
    for weight, bias in params["layers"]:
        x = jnp.tanh((x.astype(HALF) @ weight.astype(HALF)).astype(jnp.float32) + bias)
    x = x @ params["head"].astype(HALF) + 0.1 * jnp.mean(params["head"])
    return jnp.mean(x.astype(jnp.float32) ** 2)


PARAMS = {"layers": [(draw(WIDTH, WIDTH), draw(WIDTH)) for _ in range(6)], "head": draw(WIDTH, 4)}
X = draw(ROWS * NUM_MICROBATCHES, WIDTH)


def stage(mesh: Any, **options: Any) -> Any:
    layers = trace_layers(mixed_precision_loss, PARAMS, X[:ROWS])
    bounds = (0, 2, 4, len(layers))
    return build_pipeline(
        layers, bounds, mesh, NUM_MICROBATCHES, **{"reduce": "mean", "skip_bubbles": True} | options
    )


def equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """All equations, those of nested jaxprs included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(list(eqn.params.values())):
            closed = getattr(inner, "jaxpr", inner)
            if isinstance(closed, Jaxpr):
                yield from equations(closed)


def tick_bodies(pipeline: Any, params: Any, x: jax.Array) -> list[Jaxpr]:
    """The bodies of the loops over ticks of the training program."""
    jaxpr = jax.make_jaxpr(pipeline.value_and_grad)(pipeline.place(params), x).jaxpr
    return [eqn.params["jaxpr"].jaxpr for eqn in equations(jaxpr) if eqn.primitive.name == "scan"]


def casts_of_weights(jaxpr: Jaxpr) -> int:
    shapes = {(WIDTH, WIDTH), (WIDTH, 4)}
    return sum(
        eqn.primitive.name == "convert_element_type"
        and eqn.invars[0].aval.shape in shapes
        and (eqn.invars[0].aval.dtype, eqn.params["new_dtype"]) == (jnp.float32, HALF)
        for eqn in equations(jaxpr)
    )


@pytest.mark.parametrize("remat", ["stage", None])
def test_weights_are_cast_before_the_loop(
    remat: Any, stage_mesh: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the head, which is read uncast too. The gradients are the same, bit for bit, but for
    products in float32, which are made where weights come in narrow.
    """
    monkeypatch.setattr(vjp, "gradients_of", lambda vjp_fn, cotangents, _: vjp_fn(cotangents)[0])
    pipeline = stage(stage_mesh(NUM_STAGES), remat=remat)
    staged = pipeline.place(PARAMS)
    once = jax.jit(pipeline.value_and_grad)(staged, X)
    bodies = tick_bodies(pipeline, PARAMS, X)
    assert bodies
    layers = [casts_of_weights(body) for body in bodies]
    monkeypatch.setattr(ticks, "take_casts_out", lambda program: CastProgram(program, {}))
    other = stage(stage_mesh(NUM_STAGES), remat=remat)
    assert sum(map(casts_of_weights, tick_bodies(other, PARAMS, X))) > 3 * sum(layers)
    again = jax.jit(other.value_and_grad)(staged, X)
    jax.tree.map(np.testing.assert_array_equal, once, again)


def test_a_message_is_stored_in_the_tick_that_sends_it(stage_mesh: Callable) -> None:
    """No result of a permute is carried as it is to the next tick: it would overlap nothing."""
    for body in tick_bodies(stage(stage_mesh(NUM_STAGES)), PARAMS, X):
        sent = {eqn.outvars[0] for eqn in equations(body) if eqn.primitive.name == "ppermute"}
        assert not sent.intersection(body.outvars)
    permutes = [
        eqn
        for body in tick_bodies(stage(stage_mesh(NUM_STAGES)), PARAMS, X)
        for eqn in body.eqns
        if eqn.primitive.name == "ppermute"
    ]
    assert permutes


def masked_accumulators(jaxpr: Jaxpr) -> int:
    """Selections between two arrays of a weight's shape."""
    return sum(
        eqn.primitive.name == "select_n" and eqn.outvars[0].aval.shape == (WIDTH, WIDTH)
        for eqn in equations(jaxpr)
    )


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "zero_bubble"])
def test_gradients_are_masked_only_where_bubbles_run(schedule: str, stage_mesh: Callable) -> None:
    """Idle devices of an accelerator compute: their ticks mask. Ticks in which no device idles do
    not, nor do conditions.
    """
    mesh = stage_mesh(NUM_STAGES)
    conditional = tick_bodies(stage(mesh, schedule=schedule), PARAMS, X)
    assert not any(map(masked_accumulators, conditional))
    computing = stage(mesh, schedule=schedule, skip_bubbles=False, bubble_fill=math.nan)
    masked = [masked_accumulators(body) > 0 for body in tick_bodies(computing, PARAMS, X)]
    assert (
        masked
        == {
            "1f1b": [False, True, False, True],  # forward only, filling, all devices, draining
            "gpipe": [False, True, False, True],
            "zero_bubble": [False] * len(masked),
        }[schedule]
    )
    value, gradients = jax.jit(computing.value_and_grad)(computing.place(PARAMS), X)
    want = jax.value_and_grad(mixed_precision_loss)(PARAMS, X)
    assert_trees_close((value, computing.gather(gradients)), want, 2e-2)


@pytest.mark.parametrize("skip_bubbles", [True, False])
def test_no_tick_copies_a_buffer(skip_bubbles: bool, stage_mesh: Callable) -> None:
    """Buffers of messages and the stash are written in place: no loop copies an array as large as
    two messages.
    """
    pipeline = stage(stage_mesh(NUM_STAGES), skip_bubbles=skip_bubbles)
    staged = pipeline.place(PARAMS)
    program = jax.jit(pipeline.value_and_grad).lower(staged, X).compile()
    bodies = loop_bodies(read_module(program.as_text()))
    assert len(bodies) >= 3
    copied = [
        instruction.type
        for body in bodies
        for instruction in body
        if instruction.opcode == "copy" and (instruction.num_elements or 0) >= 2 * ROWS * WIDTH
    ]
    assert not copied
