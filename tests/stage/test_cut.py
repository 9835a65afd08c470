"""The cut: stages run one after the other are the program, operation by operation and bit by
bit.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxpr_as_fun
from jax.tree_util import keystr, tree_leaves_with_path

from layerwise_jax._jax import inner_jaxprs
from layerwise_jax.stage.cut import CutError, Stage, cut_stages, run_stage
from layerwise_jax.trace.layers import LayerSequence, trace_layers
from layerwise_jax.trace.primitives import REMATS
from layerwise_jax.trace.program import nbytes
from tests.models.zoo import BATCH, CASES, Case
from tests.support.staging import even_boundaries, trace_case
from tests.support.zoo_case import TIME, WIDTH

UNROLLED = {"gpt_scan", "gpt_scan_remat"}
"""Models whose scan over layers is compared with a Python loop; all others with their jaxpr."""


def run_stages(layers: LayerSequence, boundaries: Sequence[int], params: Any, *inputs: Any) -> Any:
    """The stages in order, each given its own weights and inputs and what the stage before it
    sent.
    """
    leaves = jax.tree.leaves(params)
    inputs_by_value = dict(zip(layers.program.inputs, jax.tree.leaves(inputs), strict=True))
    arrived, outputs = {}, {}
    for stage in cut_stages(layers, boundaries):
        known = {x: weight.of(leaves[weight.leaf]) for x, weight in stage.weights.items()}
        known |= {x: inputs_by_value[x] for x in stage.inputs} | {
            x: arrived[x] for x in stage.receives
        }
        results = run_stage(layers.program, stage, known)
        arrived = dict(zip(stage.sends, results, strict=False))
        outputs |= dict(zip(stage.outputs, results[len(stage.sends) :], strict=True))
    return layers.signature.outputs([outputs[p] for p in sorted(outputs)])


def run_uncut(case: Case) -> list[Any]:
    """The leaves of what the function returns, one operation at a time."""
    if case.name in UNROLLED:
        return jax.tree.leaves(case.fn(case.params, *case.inputs))
    jaxpr = jax.make_jaxpr(case.fn)(case.params, *case.inputs)
    return jaxpr_as_fun(jaxpr)(*jax.tree.leaves((case.params, case.inputs)))


def every_layer(layers: LayerSequence) -> range:
    return range(len(layers) + 1)


# With jit disabled Flax splits the keys of a scan in another way, so that there is nothing to
# compare with.
@pytest.mark.parametrize("name", [name for name in CASES if name != "gpt_scan_dropout"])
def test_a_stage_for_every_layer_gives_the_same_bits(name: str) -> None:
    case = CASES[name]()
    layers = trace_case(case, case.fn, 1)
    with jax.disable_jit(
        name != "lstm"
    ):  # its scans over time are one operation each, with jit and without
        got = run_stages(layers, every_layer(layers), case.params, *case.inputs)
        want = run_uncut(case)
    for (path, x), y in zip(tree_leaves_with_path(got), want, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y, err_msg=f"{name}{keystr(path)}")


def test_tied_weights_are_known_to_the_stages_that_use_them_and_to_no_other() -> None:
    case = CASES["gpt"]()
    layers = trace_case(case, case.fn, 1)
    (embedding,) = [j for j, name in enumerate(layers.signature.params_names) if "Embed_0" in name]
    stages = cut_stages(layers, even_boundaries(len(layers), 3))
    users = [embedding in {weight.leaf for weight in stage.weights.values()} for stage in stages]
    assert users == [True, False, True]


def test_a_long_skip_is_relayed_by_the_stages_between() -> None:
    case = CASES["unet"]()
    layers = trace_case(case, case.fn, 1)
    stages = cut_stages(layers, every_layer(layers))
    (skip,) = stages[0].sends
    relaying = [
        s for s, stage in enumerate(stages) if skip in stage.receives and skip in stage.sends
    ]
    (user,) = [s for s, name in enumerate(layers.names) if name == "ConvTranspose_2"]
    assert relaying == list(range(1, user))
    assert skip in {x for op in stages[user].ops for x in op.values}


def test_what_depends_on_no_data_moves_to_its_users() -> None:
    """Between blocks nothing crosses but the residual stream: the masks are made again from the
    tokens.
    """
    case = CASES["gpt"]()
    layers = trace_case(case, case.fn, 1)
    residual_stream = BATCH * TIME * WIDTH * 4
    assert layers.boundary_bytes == (0, *[residual_stream] * (len(layers) - 1), 0)
    for before, stage in zip(
        layers.boundary_bytes, cut_stages(layers, every_layer(layers)), strict=False
    ):
        assert sum(nbytes(layers.program.avals[x]) for x in stage.receives) == before


def test_a_scan_over_layers_is_cut_into_its_rows() -> None:
    case = CASES["gpt_scan"]()
    layers = trace_case(case, case.fn, 1)
    assert layers.names == (
        "Embed_0",
        *[f"block[{row}]" for row in range(8)],
        "final_norm",
        "Embed_0 (use 2)",
    )
    for row, stage in enumerate(cut_stages(layers, every_layer(layers))[1:9]):
        assert "scan" not in {op.name for op in stage.ops}
        assert {(weight.start, weight.stop) for weight in stage.weights.values()} == {
            (row, row + 1)
        }


def stage_jaxpr(layers: LayerSequence, stage: Stage) -> Any:
    known = [*stage.weights, *stage.inputs, *stage.receives]
    avals = [layers.program.avals[x] for x in known]
    return jax.make_jaxpr(
        lambda *values: run_stage(layers.program, stage, dict(zip(known, values, strict=True)))
    )(*avals)


def equations(jaxpr: Any) -> list[Any]:
    """All equations, nested ones included."""
    nested = [inner for eqn in jaxpr.eqns for inner in inner_jaxprs(eqn)]
    return [
        *jaxpr.eqns,
        *(eqn for inner in nested for eqn in equations(getattr(inner, "jaxpr", inner))),
    ]


def test_a_checkpoint_around_many_layers_stands_in_every_stage_with_its_policy() -> None:
    case = CASES["checkpointed"]()
    layers = trace_case(case, case.fn, 1)
    for stage in cut_stages(layers, even_boundaries(len(layers), 4)):
        top = stage_jaxpr(layers, stage).eqns
        remats = [eqn for eqn in top if eqn.primitive.name in REMATS]
        assert [eqn.params["policy"] for eqn in remats] == [jax.checkpoint_policies.dots_saveable]
        assert "dot_general" not in {eqn.primitive.name for eqn in top}


def test_custom_derivatives_are_not_opened() -> None:
    case = CASES["custom_derivatives"]()
    layers = trace_case(case, case.fn, 1)
    for stage in cut_stages(layers, every_layer(layers)):
        assert {"custom_jvp_call", "custom_vjp_call"} <= {op.name for op in stage.ops}

    def loss(params: Any, *inputs: Any) -> Any:
        return case.loss_of(run_stages(layers, every_layer(layers), params, *inputs), *inputs)

    want = jax.grad(case.loss_fn)(case.params, *case.inputs)
    for got, gradient in zip(jax.grad(loss)(case.params, *case.inputs), want, strict=True):
        assert not got["weight"][
            :, 0
        ].any()  # relu's own rule at zero; the maximum inside it would give half
        np.testing.assert_allclose(got["weight"], gradient["weight"], rtol=1e-6, atol=1e-9)


def test_integers_masks_and_keys_cross() -> None:
    def fn(weights: list[Any], x: Any, key: Any) -> Any:
        x = x @ weights[0]
        mask, index = x > 0, jnp.argmax(x, axis=-1)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)
        x = jnp.tanh(jnp.tanh(x @ weights[1]) @ weights[2])
        noise = jax.vmap(lambda key: jax.random.normal(key, (4,)))(keys)
        return jnp.where(mask, x, noise) @ weights[3] + index[:, None]

    random = np.random.default_rng(0)
    weights = [jnp.asarray(random.standard_normal((4, 4)), jnp.float32) for _ in range(4)]
    inputs = jnp.asarray(random.standard_normal((8, 4)), jnp.float32), jax.random.key(3)
    layers = trace_layers(fn, weights, *inputs)
    middle = cut_stages(layers, every_layer(layers))[1]
    crossing = {str(layers.program.avals[x].dtype) for x in middle.sends}
    assert crossing == {"float32", "bool", "int32", "key<fry>"}
    with jax.disable_jit():
        got = run_stages(layers, every_layer(layers), weights, *inputs)
        np.testing.assert_array_equal(got, fn(weights, *inputs))


def test_a_mutable_reference_does_not_cross() -> None:
    def fn(weights: list[Any], x: Any) -> Any:
        total = jax.new_ref(x @ weights[0])
        total[...] += x @ weights[1]
        return jnp.tanh(total[...]) @ weights[2]

    layers = trace_layers(fn, [jnp.ones((4, 4))] * 3, jnp.ones((2, 4)))
    with pytest.raises(
        CutError, match=r"A mutable reference made at .*test_cut.py.* is alive after stage 0"
    ):
        cut_stages(layers, every_layer(layers))


@pytest.mark.parametrize(
    "cut", [lambda n: (0, n + 1), lambda n: (1, n), lambda n: (0, 3, 3, n), lambda n: (0,)]
)
def test_boundaries_that_do_not_split_the_layers_are_refused(
    cut: Callable[[int], Sequence[int]],
) -> None:
    case = CASES["jitted"]()
    layers = trace_case(case, case.fn, 1)
    with pytest.raises(ValueError, match="rise from 0 to 8"):
        cut_stages(layers, cut(len(layers)))
