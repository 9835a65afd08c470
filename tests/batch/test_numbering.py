"""Numbers of the examples as data: those of the full batch, or of each part where examples mix."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from layerwise_jax.batch.analysis import BatchError
from tests.support.batching_run import Split

BATCH, WIDTH, PARTS = 8, 3, 2


def split(fn: Any) -> Split:
    x = jnp.asarray(np.random.default_rng(2).standard_normal((BATCH, WIDTH)), jnp.float32)
    return Split(fn, jnp.float32(0.5), (x, jax.random.key(0)), (0, None), PARTS)


def in_parts(run: Split) -> np.ndarray:
    batching = run.analyse(statistics="per_microbatch")
    assert [output.kind for output in batching.outputs] == ["rows"]
    return run.run_in_parts(batching)[0]


def of_each_part(run: Split) -> np.ndarray:
    return np.concatenate([run.fn(run.params, *run.part(i)) for i in range(PARTS)])


def numbers(x: jax.Array) -> jax.Array:
    return jnp.arange(len(x))


def rank(x: jax.Array) -> jax.Array:
    return x[jnp.argsort(x[:, 0])]


def rank_twice(x: jax.Array) -> jax.Array:
    order = jnp.argsort(x[:, 0])
    return x[order] - 2 * x[jnp.argsort(order)]


def scatter_by_rank(x: jax.Array) -> jax.Array:
    return jnp.zeros_like(x).at[jnp.argsort(x[:, 0])].set(x)


def shift(x: jax.Array) -> jax.Array:
    """Rows by an index that is computed from numbers, beside the numbers as data."""
    number = numbers(x)
    return x[(number + 1) % jnp.max(number + 1)] + number[:, None]


def share(x: jax.Array) -> jax.Array:
    return x * (numbers(x) / jnp.sum(numbers(x)))[:, None]


def best(x: jax.Array) -> jax.Array:
    return x + x[lax.top_k(x[:, 0], 1)[1]]


def in_a_loop(x: jax.Array) -> jax.Array:
    return lax.fori_loop(0, 2, lambda _, x: rank(x), x)


@pytest.mark.parametrize(
    "mix",
    [rank, rank_twice, scatter_by_rank, shift, share, best, in_a_loop],
    ids=lambda f: f.__name__,
)
def test_mixing_operations_see_the_numbers_of_their_part(mix: Any) -> None:
    run = split(lambda weight, x, key: mix(jnp.tanh(x * weight)))
    np.testing.assert_allclose(in_parts(run), of_each_part(run), atol=1e-6)
    if mix is not share:  # which divides by a total of the batch, whatever the split
        with pytest.raises(BatchError):
            run.analyse()


def test_numbers_beside_statistics_stay_those_of_the_batch() -> None:
    """Positions and keys folded from numbers are the unstaged ones, whatever else mixes."""

    def fn(weight: Any, x: Any, key: Any) -> Any:
        noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), (WIDTH,)))
        x = x * weight + numbers(x)[:, None] + noise(numbers(x))
        return x - 0 * jnp.mean(x, 0)

    run = split(fn)
    np.testing.assert_allclose(in_parts(run), run.run_whole()[0], atol=1e-5)


def test_a_permutation_is_one_of_its_part() -> None:
    def fn(weight: Any, x: Any, key: Any) -> Any:
        return (x * weight)[jax.random.permutation(key, len(x))]

    run = split(fn)
    came = in_parts(run)
    for i in range(PARTS):
        rows = np.asarray(run.part(i)[0]) * 0.5
        part = came[i * len(rows) : (i + 1) * len(rows)]
        np.testing.assert_allclose(np.sort(part, 0), np.sort(rows, 0), atol=1e-6)
