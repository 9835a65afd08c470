"""Random functions, some of which mix their examples: each is refused, or right.

A function is a chain of steps on features float32[examples, TIME, WIDTH] and an end. Steps that
treat each example by itself are never refused.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from layerwise_jax.batch.analysis import BatchError
from tests.support.batching_cases import IN_AXES, Inputs, draw_inputs, draw_weight, examples
from tests.support.batching_run import Split, assert_equal

Step = Callable[[jax.Array, Inputs], jax.Array]


def noise(x: jax.Array, inputs: Inputs) -> jax.Array:
    return x + jax.random.normal(inputs["key"], x.shape)


def attend(x: jax.Array, _: Inputs) -> jax.Array:
    return jnp.einsum("bts,bsd->btd", jnp.einsum("btd,bsd->bts", x, x), x) / 8


def add_running_sums(x: jax.Array, _: Inputs) -> jax.Array:
    return x + lax.scan(lambda h, row: (h + row, h), x[:, 0], jnp.swapaxes(x, 0, 1))[1].swapaxes(
        0, 1
    )


ALONE: dict[str, Step] = {
    "tanh": lambda x, _: jnp.tanh(x),
    "fold": lambda x, _: (x.reshape(-1, x.shape[-1]) * 2).reshape(x.shape),
    "centre": lambda x, _: x - jnp.mean(x, -1, keepdims=True),
    "attend": attend,
    "recur": add_running_sums,
    "sort time": lambda x, _: jnp.sort(x, 1),
    "roll time": lambda x, _: jnp.roll(x, 1, 1),
    "mask": lambda x, inputs: jnp.where(inputs["tokens"][..., None] > 1, x, 0),
    "take": lambda x, inputs: x[jnp.arange(examples(x))[:, None], inputs["tokens"] % 3],
    "take along": lambda x, inputs: x + jnp.take_along_axis(x, inputs["tokens"][..., None], -1),
    "number": lambda x, _: x * jnp.arange(examples(x), dtype=x.dtype)[:, None, None],
    "noise": noise,
    "batch last and back": lambda x, _: jnp.moveaxis(jnp.cumsum(jnp.moveaxis(x, 0, 2), 0), 2, 0),
    "ones": lambda x, _: x * jnp.ones((examples(x), 1, 1)),
}
MIXING: dict[str, Step] = {
    "centre batch": lambda x, _: x - jnp.mean(x, 0),
    "add batch": lambda x, _: x + jnp.sum(x, 0, keepdims=True),
    "sort batch": lambda x, _: jnp.sort(x, 0),
    "roll batch": lambda x, _: jnp.roll(x, 1, 0),
    "reverse batch": lambda x, _: x[::-1],
    "accumulate batch": lambda x, _: jnp.cumsum(x, 0),
    "softmax batch": lambda x, _: jax.nn.softmax(x, 0),
    "attend over batch": lambda x, _: jnp.einsum("btd,ctd,ctf->btf", x, x, x) / 8,
    "first": lambda x, _: x + x[0],
    "take from others": lambda x, inputs: x[inputs["tokens"][:, 0]],
    "fold badly": lambda x, _: jnp.cumsum(x.reshape(-1, x.shape[-1]), 0).reshape(x.shape),
    "by length": lambda x, _: x / examples(x),
    "scan batch": lambda x, _: lax.scan(lambda h, row: (h + row, h), x[0], x)[1],
    "read off": lambda x, _: jnp.swapaxes(x, 0, 1).reshape(x.shape),
}
ENDS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "rows": lambda x: x,
    "mean": jnp.mean,
    "sum": jnp.sum,
    "mean of rows": lambda x: jnp.mean(x, 0),
    "sum over length": lambda x: jnp.sum(x) / examples(x),
    "squared mean": lambda x: jnp.mean(x) ** 2,
    "largest": jnp.max,
    "share": lambda x: jnp.sum(x) / (1 + jnp.sum(jnp.abs(x))),
    "counts": lambda x: jnp.zeros(3).at[jnp.where(x > 0, 1, 2)].add(x),
}
REDUCE = {
    "mean": "mean",
    "sum": "sum",
    "mean of rows": "mean",
    "sum over length": "mean",
    "counts": "sum",
}


def chain(steps: Sequence[Step], end: Callable[[jax.Array], jax.Array]) -> Callable[..., Any]:
    def fn(weight: jax.Array, inputs: Inputs) -> jax.Array:
        x = jnp.tanh(inputs["x"] * weight)
        for step in steps:
            x = step(x, inputs)
        return end(x)

    return fn


def split(fn: Callable[..., Any], parts: int) -> Split:
    axes = tuple(IN_AXES[name] for name in sorted(IN_AXES))
    return Split(fn, draw_weight(), (draw_inputs(),), axes, parts)


def check(run: Split, reduce: str | None) -> None:
    batching = run.analyse(reduce=reduce)
    with jax.disable_jit():  # what is run by itself is compiled once for all functions
        assert_equal(run.run_in_parts(batching), run.run_whole(), 1e-5)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from(sorted(ALONE)), max_size=4),
    st.sampled_from(["rows", *REDUCE]),
    st.sampled_from([2, 4]),
)
def test_functions_of_each_example_alone_split(names: list[str], end: str, parts: int) -> None:
    check(split(chain([ALONE[name] for name in names], ENDS[end]), parts), REDUCE.get(end))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.sampled_from(sorted(ALONE | MIXING)), max_size=3),
    st.sampled_from(sorted(ENDS)),
    st.sampled_from([2, 4, 8]),
    st.sampled_from(["mean", "sum", None]),
)
def test_functions_are_refused_or_right(
    names: list[str], end: str, parts: int, reduce: str | None
) -> None:
    steps = ALONE | MIXING
    run = split(chain([steps[name] for name in names], ENDS[end]), parts)
    with contextlib.suppress(BatchError):
        check(run, reduce)
