"""Every sampler of `jax.random` gives the unstaged numbers, or is refused by name."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layerwise_jax.batch.analysis import BatchError
from tests.support.batching_run import Split, assert_equal

BATCH, WIDTH = 4, 3
IMPLEMENTATIONS = ("threefry2x32", "rbg", "unsafe_rbg")

Sampler = Callable[[Any, tuple[int, ...]], Any]
"""(key, shape) to an array of that shape, whose leading axis is the batch if there is one."""

CONCENTRATION = jnp.linspace(0.5, 2.0, WIDTH)
COVARIANCE = jnp.eye(WIDTH) + 0.1
TABLE = jnp.arange(10.0)

random = jax.random

SAMPLERS: dict[str, Sampler] = {
    "ball": lambda key, shape: random.ball(key, 2, 2.0, shape),
    "bernoulli": lambda key, shape: random.bernoulli(key, 0.3, shape),
    "beta": lambda key, shape: random.beta(key, 2.0, 0.5, shape),
    "binomial": lambda key, shape: random.binomial(key, 5, 0.3, shape),
    "bits": lambda key, shape: random.bits(key, shape),
    "categorical": lambda key, shape: random.categorical(key, CONCENTRATION, shape=shape),
    "cauchy": lambda key, shape: random.cauchy(key, shape),
    "chisquare": lambda key, shape: random.chisquare(key, 3.0, shape=shape),
    "choice": lambda key, shape: random.choice(key, TABLE, shape),
    "clone": lambda key, shape: random.normal(random.clone(key), shape),
    "dirichlet": lambda key, shape: random.dirichlet(key, CONCENTRATION, shape[:-1]),
    "double_sided_maxwell": lambda key, shape: random.double_sided_maxwell(key, 0.0, 1.0, shape),
    "exponential": lambda key, shape: random.exponential(key, shape),
    "f": lambda key, shape: random.f(key, 3.0, 4.0, shape=shape),
    "fold_in": lambda key, shape: random.normal(random.fold_in(key, 3), shape),
    "gamma": lambda key, shape: random.gamma(key, 2.0, shape),
    "generalized_normal": lambda key, shape: random.generalized_normal(key, 1.5, shape),
    "geometric": lambda key, shape: random.geometric(key, 0.3, shape=shape),
    "gumbel": lambda key, shape: random.gumbel(key, shape),
    "key_data": lambda key, shape: random.normal(
        random.wrap_key_data(random.key_data(key), impl=random.key_impl(key)), shape
    ),
    "laplace": lambda key, shape: random.laplace(key, shape),
    "loggamma": lambda key, shape: random.loggamma(key, 0.4, shape),
    "logistic": lambda key, shape: random.logistic(key, shape),
    "lognormal": lambda key, shape: random.lognormal(key, shape=shape),
    "maxwell": lambda key, shape: random.maxwell(key, shape),
    "multinomial": lambda key, shape: random.multinomial(
        key, 5.0, CONCENTRATION / CONCENTRATION.sum(), shape=shape
    ),
    "multivariate_normal": lambda key, shape: random.multivariate_normal(
        key, CONCENTRATION, COVARIANCE, shape[:-1]
    ),
    "normal": lambda key, shape: random.normal(key, shape),
    "orthogonal": lambda key, shape: random.orthogonal(key, 2, shape),
    "pareto": lambda key, shape: random.pareto(key, 2.0, shape),
    "permutation": lambda key, shape: random.permutation(
        key, jnp.broadcast_to(TABLE[:WIDTH], shape), axis=-1, independent=True
    ),
    "poisson": lambda key, shape: random.poisson(key, 3.0, shape),
    "rademacher": lambda key, shape: random.rademacher(key, shape),
    "randint": lambda key, shape: random.randint(key, shape, 0, 17),
    "rayleigh": lambda key, shape: random.rayleigh(key, 1.5, shape),
    "split": lambda key, shape: jax.vmap(lambda k: random.normal(k, shape[1:]))(
        random.split(key, shape[0])
    ),
    "t": lambda key, shape: random.t(key, 3.0, shape),
    "triangular": lambda key, shape: random.triangular(key, 0.0, 0.3, 1.0, shape),
    "truncated_normal": lambda key, shape: random.truncated_normal(key, -1.0, 1.0, shape),
    "uniform": lambda key, shape: random.uniform(key, shape),
    "wald": lambda key, shape: random.wald(key, 1.5, shape),
    "weibull_min": lambda key, shape: random.weibull_min(key, 1.5, 2.0, shape),
}
# Public names that draw nothing.
NO_SAMPLERS = frozenset("Key PRNGKey key key_data key_dtype key_impl wrap_key_data".split())

THREEFRY_ONLY = frozenset({"poisson"})


SAMPLE = ("dirichlet", "gamma", "normal", "split")
NAMES = [
    pytest.param(SAMPLE, id="sample"),
    pytest.param(tuple(SAMPLERS), id="all", marks=pytest.mark.slow),
]


@dataclass(frozen=True)
class Keys:
    """One key for the batch, or one for each example."""

    implementation: str
    per_example: bool


def test_every_sampler_is_listed() -> None:
    public = {name for name in dir(random) if callable(getattr(random, name)) and name[0] != "_"}
    assert public - NO_SAMPLERS <= set(SAMPLERS)


def from_one_key(sampler: Sampler) -> Callable[..., Any]:
    """(weight [], x [batch, width], key) -> one draw for the whole batch."""
    return lambda weight, x, key: (x * weight, sampler(key, x.shape))


def from_key_per_example(sampler: Sampler) -> Callable[..., Any]:
    """(weight [], x [batch, width], keys [batch]) -> one draw for each example."""
    return lambda weight, x, keys: (x * weight, jax.vmap(lambda k: sampler(k, (2, WIDTH)))(keys))


def split(fn: Callable[..., Any], key: Keys) -> Split:
    one = random.key(3, impl=key.implementation)
    keys = random.split(one, BATCH) if key.per_example else one
    axes = (0, 0 if key.per_example else None)
    return Split(fn, jnp.float32(2), (jnp.ones((BATCH, WIDTH)), keys), axes, 2)


def check(run: Split) -> None:
    assert_equal(run.run_in_parts(run.analyse()), run.run_whole(), 1e-6)


def together(
    samplers: list[str], wrap: Callable[[Sampler], Callable[..., Any]]
) -> Callable[..., Any]:
    """The draws of several samplers as one function, to be compiled once."""
    return lambda *args: [wrap(SAMPLERS[name])(*args) for name in samplers]


def is_refused(name: str, wrap: Callable[[Sampler], Any], key: Keys) -> bool:
    """True if a sampler is refused, by name of what it does; `poisson` needs threefry keys."""
    try:
        split(wrap(SAMPLERS[name]), key).analyse()
    except NotImplementedError:
        return True
    except BatchError as error:
        return bool(re.search("draws (by the shape|with the first key)", str(error)))
    return False


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_key_draws_for_the_whole_batch(implementation: str, names: Sequence[str]) -> None:
    key = Keys(implementation, per_example=False)
    refused = {name for name in names if is_refused(name, from_one_key, key)}
    assert refused <= THREEFRY_ONLY
    assert not (implementation == "threefry2x32" and refused)
    check(split(together(sorted(set(names) - refused), from_one_key), key))


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_key_per_example(implementation: str, names: Sequence[str]) -> None:
    """Keys that are inputs draw for the full batch beforehand, where rbg reads the first alone."""
    key = Keys(implementation, per_example=True)
    refused = {name for name in names if is_refused(name, from_key_per_example, key)}
    assert refused <= THREEFRY_ONLY
    check(split(together(sorted(set(names) - refused), from_key_per_example), key))


@pytest.mark.parametrize("implementation", ["rbg", "unsafe_rbg"])
def test_keys_made_from_weights_draw_in_their_part_or_are_refused(implementation: str) -> None:
    """Nothing is computed beforehand there: what draws with the first key for all is refused."""

    def fn(weight: Any, x: Any, key: Any) -> Any:
        seeds = jnp.arange(len(x)) + (weight > 0)
        keys = jax.vmap(lambda seed: random.key(seed, impl=implementation))(seeds)
        return x * weight + jax.vmap(lambda key: random.normal(key, (WIDTH,)))(keys)

    with pytest.raises(BatchError, match=r"random_bits .*draws with the first key of the batch"):
        split(fn, Keys(implementation, per_example=False)).analyse()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gamma_of_weights_has_the_unstaged_gradient(implementation: str) -> None:
    def fn(weight: Any, x: Any, key: Any) -> Any:
        return jnp.mean(random.gamma(key, jnp.exp(x * weight)) * x)

    run = split(fn, Keys(implementation, per_example=False))
    gradient = jax.grad(fn)(run.params, *run.inputs)
    assert_equal([run.gradients_in_parts(run.analyse())], [np.asarray(gradient)], 1e-5)
