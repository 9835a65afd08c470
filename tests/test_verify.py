"""`verify` finds nothing in a right pipeline, and names the stage of a planted fault."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh

import layerwise_jax as lw
from layerwise_jax.trace.program import Op

BATCH, WIDTHS = 8, (4, 6, 5, 7, 3)
KEYS = jax.random.split(jax.random.key(0), 5)
PARAMS = [
    {"w": jax.random.normal(key, (inward, outward)) / 2, "count": jnp.zeros(())}
    for key, inward, outward in zip(KEYS, WIDTHS, WIDTHS[1:], strict=False)
]
X = jax.random.normal(KEYS[4], (BATCH, WIDTHS[0]))
STAGES = len(PARAMS)
EACH_STAGE = [pytest.param(s, marks=[pytest.mark.slow] * (s != 1)) for s in range(STAGES)]


def fn(params: list[dict[str, Any]], x: jax.Array) -> Any:
    state = []
    for layer in params:
        x = jnp.tanh(x @ layer["w"]) / (2 + layer["count"])
        state.append({"count": layer["count"] + 1})
    return jnp.mean(x**2), x, state


@pytest.fixture(scope="module")
def pipeline() -> lw.Pipeline:
    """Four stages of one layer each, all of them different."""
    layers = lw.trace_layers(fn, PARAMS, X[: BATCH // 2])
    mesh = Mesh(jax.devices()[:STAGES], ("stage",))
    cuts = tuple(range(STAGES + 1))
    return lw.build_pipeline(layers, cuts, mesh, 2, reduce="mean", state=lambda out: out[2])


def planted(pipeline: lw.Pipeline, stage: int, change: Callable[[Op], Op]) -> lw.Pipeline:
    """The pipeline with the operations of one stage changed; the traced function is as it was."""
    alignment = pipeline.loop.alignment
    assert not alignment.num_layers
    parts = list(alignment.parts)
    ops = tuple(map(change, parts[stage].before))
    assert ops != parts[stage].before
    parts[stage] = replace(parts[stage], before=ops)
    loop = replace(pipeline.loop, alignment=replace(alignment, parts=tuple(parts)))
    return replace(pipeline, loop=loop)


def with_equation(op: Op, function: Callable[[jax.Array], jax.Array]) -> Op:
    """The operation with the one equation of `function` in its place."""
    aval = op.eqn.invars[0].aval
    (eqn,) = jax.make_jaxpr(function)(jax.ShapeDtypeStruct(aval.shape, aval.dtype)).eqns
    return replace(op, eqn=eqn)


@jax.custom_vjp
def backwards_wrong(x: jax.Array) -> jax.Array:
    return jnp.tanh(x)


backwards_wrong.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (2 * g,))


def test_a_right_pipeline_is_equal(pipeline: lw.Pipeline) -> None:
    found = pipeline.verify(PARAMS, X)
    assert found.is_equal
    assert found.first_stage is None
    assert {each.kind for each in found.differences} == {"output", "gradient", "state"}
    assert len(found.differences) == 2 + 2 * STAGES
    assert "all leaves are equal" in str(found)
    assert "[3]['w']" in str(found)


@pytest.mark.parametrize("stage", EACH_STAGE)
def test_a_fault_of_forward(pipeline: lw.Pipeline, stage: int) -> None:
    def change(op: Op) -> Op:
        return with_equation(op, jnp.sin) if op.name == "tanh" else op

    found = planted(pipeline, stage, change).verify(PARAMS, X)
    assert found.first_stage == stage
    wrong = [each for each in found.differences if not each.is_equal]
    assert {each.stage for each in wrong} == {stage}
    assert {each.kind for each in wrong} == {"output", "gradient"}
    assert f"{len(wrong)} of {len(found.differences)} leaves differ" in str(found)


@pytest.mark.parametrize("stage", EACH_STAGE)
def test_a_fault_of_backward(pipeline: lw.Pipeline, stage: int) -> None:
    def change(op: Op) -> Op:
        return with_equation(op, backwards_wrong) if op.name == "tanh" else op

    found = planted(pipeline, stage, change).verify(PARAMS, X)
    assert found.first_stage == stage
    wrong = {each.name for each in found.differences if not each.is_equal}
    assert wrong == {f"[{s}]['w']" for s in range(stage + 1)}


@pytest.mark.parametrize("stage", EACH_STAGE)
def test_a_fault_of_state(pipeline: lw.Pipeline, stage: int) -> None:
    made = {
        pipeline.loop.program.outputs[p]
        for p, leaf in pipeline.loop.renewed.items()
        if pipeline.layers.signature.params_names[leaf] == f"[{stage}]['count']"
    }

    def change(op: Op) -> Op:
        twice = (op.operands[0], op.operands[0])  # count + count in place of count + 1
        return replace(op, operands=twice) if made.intersection(op.results) else op

    found = planted(pipeline, stage, change).verify(PARAMS, X)
    assert found.first_stage == stage
    assert [x.name for x in found.differences if not x.is_equal] == [f"[{stage}]['count']"]


def test_a_fault_that_is_not_a_number(pipeline: lw.Pipeline) -> None:
    def change(op: Op) -> Op:
        return with_equation(op, jnp.log) if op.name == "tanh" else op

    assert planted(pipeline, 1, change).verify(PARAMS, X).first_stage == 1


def test_batch_statistics_are_verified_part_by_part() -> None:
    def normed(params: Any, x: jax.Array) -> Any:
        for layer in params["layers"]:
            x = jnp.tanh(x @ layer)
            x = x - jnp.mean(x, axis=0)
        mean = 0.9 * params["mean"] + 0.1 * jnp.mean(x + 1, axis=0)
        return jnp.mean(x**2), {"mean": mean}

    params = {"layers": [jnp.eye(4) * (i + 1) / 2 for i in range(4)], "mean": jnp.zeros(4)}
    layers = lw.trace_layers(normed, params, X[: BATCH // 2])
    pipeline = lw.build_pipeline(
        layers,
        (0, 2, len(layers)),
        Mesh(jax.devices()[:2], ("stage",)),
        2,
        reduce="mean",
        state=lambda out: out[1],
        batch_statistics="per_microbatch",
    )
    found = pipeline.verify(params, X)
    assert found.is_equal, str(found)
