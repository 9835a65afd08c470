"""The cut: stages run one after the other are the program, operation by operation and bit by bit."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import keystr, tree_leaves_with_path
from staging import trace_case
from zoo import CASES

from layerwise_jax.layers import LayerSequence
from layerwise_jax.stages import cut_stages, run_stage


def run_stages(layers: LayerSequence, boundaries: Sequence[int], params: Any, *inputs: Any) -> Any:
    """The stages in order, each given its own weights and inputs and what the stage before it sent."""
    leaves = jax.tree.leaves(params)
    inputs_by_value = dict(zip(layers.program.inputs, jax.tree.leaves(inputs), strict=True))
    arrived, outputs = {}, {}
    for stage in cut_stages(layers, boundaries):
        known = {x: weight.of(leaves[weight.leaf]) for x, weight in stage.weights.items()}
        known |= {x: inputs_by_value[x] for x in stage.inputs} | {x: arrived[x] for x in stage.receives}
        results = run_stage(layers.program, stage, known)
        arrived = dict(zip(stage.sends, results, strict=False))
        outputs |= dict(zip(stage.outputs, results[len(stage.sends) :], strict=True))
    return jax.tree.unflatten(layers.signature.outputs_tree, [outputs[p] for p in sorted(outputs)])


@pytest.mark.parametrize("name", CASES)
def test_a_stage_for_every_layer_gives_the_same_bits(name: str) -> None:
    case = CASES[name]()
    layers = trace_case(case, case.fn, 1)
    with jax.disable_jit():
        want = case.fn(case.params, *case.inputs)
        got = run_stages(layers, range(len(layers) + 1), case.params, *case.inputs)
    for (path, x), y in zip(tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y, err_msg=f"{name}{keystr(path)}")
