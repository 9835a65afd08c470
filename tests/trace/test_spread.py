"""Spread values: results equal those of whole arrays, and stay spread where entries decide."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from layerwise_jax.trace.spread import Spread, run_spread, whole

SIZE = 4
INDEX = Spread(jnp.int32(3), SIZE)
ROWS = Spread(jnp.arange(6.0).reshape(2, 3), SIZE)
OTHER = jnp.arange(float(SIZE))

# Functions of (index int[SIZE], rows float[SIZE, 2, 3], other float[SIZE]); is the result spread?
SPREAD = {
    "counter": lambda i, r, o: i + 1,
    "two counters": lambda i, r, o: jnp.minimum(i + 1, 2 * i),
    "comparison": lambda i, r, o: jnp.where(i > 2, i, 0),
    "cast": lambda i, r, o: i.astype(jnp.float32),
    "rows of rows": lambda i, r, o: jnp.tanh(r) * r,
    "inside jit": lambda i, r, o: jax.jit(lambda x: x + 1)(i),
    "custom rule": lambda i, r, o: jax.nn.relu(r),
    "some sequences": lambda i, r, o: i[1:3],
    "part of an entry": lambda i, r, o: r[:, 1],
    "new axis": lambda i, r, o: i[:, None],
    "reshaped": lambda i, r, o: r.reshape(SIZE, 6),
    "inner maximum": lambda i, r, o: r.max(axis=(1, 2)),
}
WHOLE = {
    "first": lambda i, r, o: i[0],
    "last": lambda i, r, o: i[-1],
    "at a place": lambda i, r, o: lax.dynamic_index_in_dim(i, o[0].astype(int), keepdims=False),
    "first of rows": lambda i, r, o: r[0, 1],
    "largest": lambda i, r, o: i.max(),
    "least row": lambda i, r, o: r.min(axis=0),
    "sum": lambda i, r, o: i.sum(),
    "with others": lambda i, r, o: i + o,
    "mask": lambda i, r, o: jnp.arange(7)[None] <= i[:, None],
    "written": lambda i, r, o: lax.dynamic_update_slice(o, o[:1], (i[0],)),
    "gathered": lambda i, r, o: o[i],
    "sorted": lambda i, r, o: jnp.sort(i),
    "moved axis": lambda i, r, o: jnp.moveaxis(r, 0, 1),
    "scan": lambda i, r, o: lax.scan(lambda c, x: (c + x, c), 0, i)[1],
    "cond": lambda i, r, o: lax.cond(i[0] > 2, lambda x: x, lambda x: -x, o),
}


@pytest.mark.parametrize("name", [*SPREAD, *WHOLE])
def test_results_are_those_of_whole_arrays(name: str) -> None:
    fn: Any = {**SPREAD, **WHOLE}[name]
    found = run_spread(fn, INDEX, ROWS, OTHER)
    want = fn(whole(INDEX), whole(ROWS), OTHER)
    assert whole(found).dtype == want.dtype
    np.testing.assert_array_equal(whole(found), want)
    assert isinstance(found, Spread) == (name in SPREAD)


def test_one_entry_is_read_without_the_array() -> None:
    """The array is never made: the entry itself comes out."""
    jaxpr = jax.make_jaxpr(lambda entry: run_spread(lambda i: i[0] + 1, Spread(entry, SIZE)))(3)
    assert [eqn.primitive.name for eqn in jaxpr.eqns] == ["add"]


def test_trees_of_arguments_and_results() -> None:
    found = run_spread(lambda tree, o: {"new": tree["i"] + 1, "o": o}, {"i": INDEX}, OTHER)
    assert isinstance(found["new"], Spread)
    assert int(found["new"].entry) == 4
    np.testing.assert_array_equal(found["o"], OTHER)
