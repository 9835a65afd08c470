"""Equal layers are found equal, and nothing that differs in a value or a gradient is."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layerwise_jax.stage.cut import cut_stages
from layerwise_jax.trace.canonical import CanonicalOps, canonicalize
from layerwise_jax.trace.layers import LayerSequence, trace_layers
from tests.models.zoo import CASES

ROWS, WIDTH = 2, 4
LayerFn = Callable[[jax.Array, jax.Array], jax.Array]


def shapes_of(layers: LayerSequence) -> list[CanonicalOps]:
    """The shape of every layer."""
    fingerprints: dict[int, Any] = {}
    stages = cut_stages(layers, range(len(layers) + 1))
    return [canonicalize(layers.program, stage.ops, fingerprints) for stage in stages]


def chain(*layer_fns: LayerFn) -> LayerSequence:
    """A layer of its own weight for each function, in order."""

    def fn(params: list[jax.Array], x: jax.Array) -> jax.Array:
        for layer_fn, weight in zip(layer_fns, params, strict=True):
            x = layer_fn(x, weight)
        return x

    weights = [jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)] * len(layer_fns)
    return trace_layers(fn, weights, jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32))


def are_equal(first: LayerFn, second: LayerFn) -> bool:
    a, b = shapes_of(chain(first, second))
    return a.key == b.key


def dense(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.tanh(x @ weight)


# Embedding, block, norm and head; of the plain layers the last has the constant output too.
DISTINCT = {
    "gpt": 4,
    "gpt_scan": 4,
    "gpt_remat": 4,
    "gpt_dropout": 4,
    "nnx_transformer": 4,
    "odd_outputs": 2,
    "mlp": 9,
}


@pytest.mark.parametrize(("name", "distinct"), DISTINCT.items())
def test_the_blocks_of_a_model_are_one_shape(name: str, distinct: int) -> None:
    case = CASES[name]()
    shapes = shapes_of(trace_layers(case.fn, case.params, *case.inputs_of(slice(0, ROWS))))
    assert len({shape.key for shape in shapes}) == distinct


def test_equal_layers_name_their_own_weights_and_reads_in_the_same_places() -> None:
    layers = chain(dense, dense)
    first, second = shapes_of(layers)
    assert first.key == second.key
    assert [
        layers.program.weights[value].leaf for shape in (first, second) for value in shape.weights
    ] == [0, 1]
    assert first.reads == layers.program.inputs
    assert second.reads == first.made[-1:]


def test_the_order_of_operands_is_part_of_the_shape() -> None:
    assert not are_equal(lambda x, w: x @ w - x, lambda x, w: x - x @ w)
    assert not are_equal(lambda x, w: x @ w + w[0], lambda x, w: x @ w + x[0])


def test_primitives_parameters_and_dtypes_are_part_of_the_shape() -> None:
    assert not are_equal(lambda x, w: jnp.sin(x @ w), lambda x, w: jnp.cos(x @ w))
    assert not are_equal(
        lambda x, w: jnp.cumsum(x @ w, axis=1), lambda x, w: jnp.cumsum(x @ w, axis=1)[:, ::-1]
    )
    half = jnp.bfloat16
    assert not are_equal(dense, lambda x, w: (x.astype(half) @ w.astype(half)).astype(jnp.float32))
    assert not are_equal(dense, lambda x, w: jnp.tanh(jnp.matmul(x, w, precision="highest")))


def test_literals_are_values_of_a_shape_not_part_of_it() -> None:
    first, second = shapes_of(chain(lambda x, w: x @ w * 2.0, lambda x, w: x @ w * 3.0))
    assert first.key == second.key
    assert [float(value) for shape in (first, second) for value in shape.literals] == [2.0, 3.0]


def test_the_index_of_a_layer_in_its_key_is_a_literal() -> None:
    """As in a dropout key that is folded with the number of the layer."""

    def noisy(index: int) -> LayerFn:
        return lambda x, w: (
            x @ w + jax.random.normal(jax.random.fold_in(jax.random.key(0), index), x.shape)
        )

    assert are_equal(noisy(1), noisy(2))


def custom_jvp(scale: Any) -> Callable[[jax.Array], jax.Array]:
    @jax.custom_jvp
    def fn(x: jax.Array) -> jax.Array:
        return jnp.sin(x)

    fn.defjvp(lambda primals, tangents: (jnp.sin(*primals), scale * tangents[0]))
    return fn


def custom_vjp(scale: float) -> Callable[[jax.Array], jax.Array]:
    @jax.custom_vjp
    def fn(x: jax.Array) -> jax.Array:
        return jnp.sin(x)

    fn.defvjp(lambda x: (jnp.sin(x), None), lambda _, g: (scale * g,))
    return fn


@pytest.mark.parametrize("rule", [custom_jvp, custom_vjp])
@pytest.mark.parametrize(
    "wrap", [lambda fn: fn, lambda fn: lambda x: jax.lax.cond(x[0, 0] > 0, fn, jnp.cos, x)]
)
def test_rules_for_gradients_are_compared_by_what_they_do(rule: Callable, wrap: Callable) -> None:
    """Also of rules that are inside a conditional: behind one primal they may differ."""
    one, other, again = wrap(rule(1.0)), wrap(rule(2.0)), wrap(rule(1.0))
    assert not are_equal(lambda x, w: one(x @ w), lambda x, w: other(x @ w))
    assert are_equal(lambda x, w: one(x @ w), lambda x, w: again(x @ w))


def test_constants_in_rules_are_compared_by_value() -> None:
    ones, twos = np.ones((ROWS, WIDTH), np.float32), np.full((ROWS, WIDTH), 2, np.float32)
    one, other, again = custom_jvp(ones), custom_jvp(twos), custom_jvp(ones.copy())
    assert not are_equal(lambda x, w: one(x @ w), lambda x, w: other(x @ w))
    assert are_equal(lambda x, w: one(x @ w), lambda x, w: again(x @ w))


def test_constants_of_the_function_are_reads() -> None:
    """Whoever takes two layers for one must see to it that what they read is the same."""
    tables = [np.full((ROWS, WIDTH), value, np.float32) for value in (1, 2)]
    layers = chain(lambda x, w: x @ w * tables[0], lambda x, w: x @ w * tables[1])
    first, second = shapes_of(layers)
    assert first.key == second.key
    read = [[x for x in shape.reads if x in layers.program.constants] for shape in (first, second)]
    for (value,), table in zip(read, tables, strict=True):
        np.testing.assert_array_equal(layers.program.constants[value], table)


def test_checkpoints_are_compared_by_policy_and_by_what_they_hold() -> None:
    def layer(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.sin(jnp.tanh(x @ weight))

    def kept(policy: Any) -> LayerFn:
        return jax.checkpoint(layer, policy=policy)

    policies = jax.checkpoint_policies
    assert are_equal(kept(policies.dots_saveable), kept(policies.dots_saveable))
    assert not are_equal(kept(policies.dots_saveable), kept(policies.nothing_saveable))
    assert not are_equal(kept(None), layer)
    sine, tanh = jax.checkpoint(jnp.sin), jax.checkpoint(lambda x, w: jnp.tanh(x @ w))
    assert not are_equal(kept(None), lambda x, w: sine(tanh(x, w)))
