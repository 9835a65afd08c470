"""Every branch policy runs the same function, and only "switch" and "select" are differentiable."""

import functools
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layerwise_jax.run.conditions import BranchPolicy, run_selected

Carry = tuple[jax.Array, jax.Array]


def add(amount: int, carry: Carry) -> Carry:
    x, held = carry
    return x + amount, held


@pytest.mark.parametrize("policy", get_args(BranchPolicy))
@pytest.mark.parametrize(
    ("keys", "among"),
    [((0, 1, 2), range(3)), ((1,), range(3)), ((5, 7), range(4, 9)), ((), range(3)), ((4,), [4])],
    ids=["all", "one", "gaps", "none", "certain"],
)
def test_the_function_of_the_index_runs(
    policy: BranchPolicy, keys: tuple[int, ...], among: Any
) -> None:
    runs = {key: functools.partial(add, 10 + key) for key in keys}
    start = (jnp.float32(1), jnp.arange(3))

    @jax.jit
    def run(index: jax.Array) -> Carry:
        return run_selected(runs, index, start, policy, among)

    for index in among:
        x, held = run(jnp.int32(index))
        assert float(x) == (11 + index if index in keys else 1)
        np.testing.assert_array_equal(held, start[1])


@pytest.mark.parametrize("policy", ["switch", "select"])
def test_policies_that_forward_loops_use_are_differentiable(policy: BranchPolicy) -> None:
    runs = {0: jnp.sin, 2: jnp.cos}

    def run(x: jax.Array, index: jax.Array) -> jax.Array:
        return run_selected(runs, index, x, policy, range(3))

    for index, slope in enumerate([jnp.cos(0.3), 1.0, -jnp.sin(0.3)]):
        assert float(jax.grad(run)(0.3, jnp.int32(index))) == pytest.approx(float(slope))


def test_select_leaves_what_no_one_changed_alone() -> None:
    """The caches of a decode ring: a `where` on each would write all of them in every tick."""
    start = (jnp.float32(1), jnp.zeros(1000))
    jaxpr = jax.make_jaxpr(
        lambda index: run_selected({1: functools.partial(add, 1)}, index, start, "select", range(2))
    )(jnp.int32(0))
    sizes = [eqn.outvars[0].aval.size for eqn in jaxpr.eqns if eqn.primitive.name == "select_n"]
    assert sizes == [1] or not sizes
    assert all(size < 1000 for eqn in jaxpr.eqns for size in [eqn.outvars[0].aval.size])
