"""The models of the zoo have the properties that the equivalence tests assume."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pytest
from jax.tree_util import keystr, tree_leaves_with_path

from tests.models.zoo import BATCH, CASES, Case

UNREACHED = {
    "resnet_train": "'batch_stats'",  # training does not read the running averages
    "nnx_batch_norm_train": "'(mean|var)'",
    "odd_outputs": "'unused'",
    "branches": "'bias'",  # half of the layers take the branch without
}
"""A pattern of the parameters whose gradient is zero."""

UNSEEN_BY_SOFTMAX = "'key'.*'bias'"
"""The parameters of any model whose gradient is zero but for rounding."""


@dataclass(frozen=True)
class Run:
    case: Case
    evaluate: Callable[..., Any]
    outputs: Any
    loss: np.ndarray
    gradients: Any


def compile_lightly(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`jit` in half the time, since speed is not what is tested; the results are numpy's, to
    compile nothing more.
    """
    jitted = jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0})
    return lambda *arguments: jax.device_get(jitted(*arguments))


def run_whole_batch(case: Case) -> Run:
    def evaluate(params: Any, *inputs: Any) -> Any:
        return case.fn(params, *inputs), *jax.value_and_grad(case.loss_fn)(params, *inputs)

    compiled = compile_lightly(evaluate)
    return Run(case, compiled, *compiled(case.params, *case.inputs))


def batched_leaves(case: Case, outputs: Any) -> list[np.ndarray]:
    """The leaves of the outputs that are not state."""
    return jax.tree.leaves(outputs[0] if case.state else outputs)


@pytest.mark.parametrize("name", CASES)
def test_case(name: str) -> None:
    """One test for all that holds of a case, so that it compiles once whichever process it runs
    in.
    """
    first = run_whole_batch(CASES[name]())
    assert first.case.name == name
    check_outputs_are_batched_and_finite(first)
    check_loss_is_a_finite_float32_scalar(first)
    check_gradients_are_finite_and_reach_every_parameter(first)
    check_a_case_made_anew_gives_the_same_bits(first)
    check_halves_of_the_batch_give_the_whole(first)
    if first.case.state:
        check_state_is_a_new_value_of_some_params(first)


def check_outputs_are_batched_and_finite(run: Run) -> None:
    outputs = batched_leaves(run.case, run.outputs)
    assert outputs
    for output in outputs:
        assert output.shape[0] == BATCH
        assert np.isfinite(output).all()


def check_loss_is_a_finite_float32_scalar(run: Run) -> None:
    assert run.loss.shape == ()
    assert run.loss.dtype == np.float32
    assert np.isfinite(run.loss)


def check_gradients_are_finite_and_reach_every_parameter(run: Run) -> None:
    pattern = UNREACHED.get(run.case.name, UNSEEN_BY_SOFTMAX)
    for path, gradient in tree_leaves_with_path(run.gradients):
        assert np.isfinite(gradient).all()
        assert gradient.any() or re.search(pattern, keystr(path)), f"{keystr(path)} has no gradient"


def check_a_case_made_anew_gives_the_same_bits(run: Run) -> None:
    again = CASES[run.case.name]()
    expected = run.outputs, run.loss, run.gradients
    jax.tree.map(np.testing.assert_array_equal, run.evaluate(again.params, *again.inputs), expected)


def check_halves_of_the_batch_give_the_whole(run: Run) -> None:
    """The mean of the halves' losses is the loss and their outputs are its outputs, or the case
    says otherwise.
    """
    case = run.case
    evaluate = compile_lightly(lambda *arguments: (case.fn(*arguments), case.loss_fn(*arguments)))
    halves = slice(0, BATCH // 2), slice(BATCH // 2, BATCH)
    (first, first_loss), (second, second_loss) = (
        evaluate(case.params, *case.inputs_of(half)) for half in halves
    )
    loss = (first_loss + second_loss) / 2
    if case.mixes_batch:
        assert abs(loss - run.loss) > 100 * case.tolerance
        return
    np.testing.assert_allclose(loss, run.loss, rtol=case.tolerance)
    parts = zip(batched_leaves(case, first), batched_leaves(case, second), strict=True)
    for output, part in zip(batched_leaves(case, run.outputs), parts, strict=True):
        np.testing.assert_allclose(
            np.concatenate(part), output, rtol=case.tolerance, atol=case.tolerance
        )


def check_state_is_a_new_value_of_some_params(run: Run) -> None:
    assert run.case.state is not None
    old = dict(tree_leaves_with_path(run.case.params))
    new = tree_leaves_with_path(run.case.state(run.outputs))
    assert new
    for path, leaf in new:
        assert leaf.shape == old[path].shape
        assert (leaf != old[path]).any()


def test_every_case_has_eight_layers_or_a_stack_of_eight() -> None:
    for make in CASES.values():
        leaves = tree_leaves_with_path(make().params)
        layers = {path[:-1] for path, _ in leaves}
        assert len(layers) >= 8 or all(leaf.shape[0] >= 8 for _, leaf in leaves)


def test_custom_rules_are_in_force() -> None:
    """Units that are exactly zero have no gradient by relu's rule, and would have half of one by
    that of maximum.
    """
    case = CASES["custom_derivatives"]()
    for gradient in jax.grad(case.loss_fn)(case.params, *case.inputs):
        assert not gradient["weight"][:, 0].any()
        assert not gradient["bias"][0].any()
        assert gradient["weight"].any()
