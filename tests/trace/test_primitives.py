"""The table of primitives covers the oldest and the newest supported JAX."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from layerwise_jax.trace import primitives
from layerwise_jax.trace.primitives import CLASS_OF, PrimitiveClass
from tests.support.jax_primitives import installed_names, recorded_names

ROOT = Path(__file__).parents[2]
RECORDED = recorded_names()


def test_the_oldest_and_the_newest_jax_are_recorded() -> None:
    oldest = re.search(r"jax>=([\d.]+)", (ROOT / "pyproject.toml").read_text())
    newest = re.search(r"^jax==([\d.]+)", (ROOT / "requirements-test.lock").read_text(), re.M)
    assert oldest is not None
    assert newest is not None
    assert {oldest[1], newest[1]} <= RECORDED.keys()


@pytest.mark.parametrize("version", RECORDED)
def test_every_primitive_has_a_class(version: str) -> None:
    assert RECORDED[version] - CLASS_OF.keys() == set()


def test_every_primitive_of_the_installed_jax_has_a_class() -> None:
    assert installed_names() - CLASS_OF.keys() == set()


def test_a_primitive_has_one_class() -> None:
    names = [name for listed in primitives._NAMES.values() for name in listed.split()]
    assert sorted(names) == sorted(CLASS_OF)


def test_every_class_has_primitives() -> None:
    assert set(CLASS_OF.values()) == set(PrimitiveClass)


LAYERS = {
    "matrix": lambda w, x: x @ w[0],
    "convolution": lambda w, x: jnp.convolve(x[0], w[0, 0]),
    "grouped matrices": lambda w, x: jax.lax.ragged_dot(x, w, jnp.array([2, 2])),
    "lookup": lambda w, x: w[0][x.astype(int)[:, 0]],
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=list(LAYERS))
def test_contractions_of_jax_start_layers(layer) -> None:
    jaxpr = jax.make_jaxpr(layer)(jnp.ones((2, 8, 8)), jnp.ones((4, 8)))
    names = {eqn.primitive.name for eqn in _all_eqns(jaxpr.jaxpr)}
    assert names & primitives.LAYER_STARTS


def _all_eqns(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            if hasattr(value, "jaxpr"):
                yield from _all_eqns(value.jaxpr)
            elif hasattr(value, "eqns"):
                yield from _all_eqns(value)
