"""Weight gradients that are products: found in a backward pass, made in float32, made later."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layerwise_jax.trace.products import FlatBackward, flatten_backward

BATCH, TIME, WIDTH, HEADS = 3, 4, 8, 2


def draw(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.bfloat16)


def backward_of(fn: Callable[..., Any], weights: list[Any], x: Any) -> tuple[FlatBackward, Any]:
    """The flat backward of `fn(weights, x)`, and its arguments: weights, x and the cotangent."""
    cotangent = jnp.ones_like(fn(weights, x))

    def backward(*flat: Any) -> Any:
        *weights, x, cotangent = flat
        gradients, of_x = jax.vjp(fn, weights, x)[1](cotangent)
        return [*gradients, of_x]

    arguments = [*weights, x, cotangent]
    jaxpr = jax.make_jaxpr(backward)(*arguments)
    flat = flatten_backward(jaxpr, len(weights), len(weights), [len(arguments) - 1])
    return flat, (arguments, jax.jit(backward)(*arguments))


def dense(weights: list[Any], x: Any) -> Any:
    return jnp.tanh(x @ weights[0]) @ weights[1]


def heads(weights: list[Any], x: Any) -> Any:
    return jnp.einsum("btw,whd->bthd", x, weights[0])


def biased(weights: list[Any], x: Any) -> Any:
    return x @ weights[0] + weights[1]


def twice(weights: list[Any], x: Any) -> Any:
    return jnp.tanh(x @ weights[0]) @ weights[0]


@pytest.mark.parametrize(
    ("fn", "shapes", "products"),
    [
        (dense, [(WIDTH, WIDTH), (WIDTH, WIDTH)], {0, 1}),
        (heads, [(WIDTH, HEADS, WIDTH // HEADS)], {0}),
        (biased, [(WIDTH, WIDTH), (WIDTH,)], {0}),  # a bias is summed, which is cheap
        (twice, [(WIDTH, WIDTH)], set()),  # two uses are added
    ],
)
def test_products_are_found_and_made_as_backward_makes_them(
    fn: Callable[..., Any], shapes: list[tuple[int, ...]], products: set[int]
) -> None:
    flat, (arguments, wanted) = backward_of(
        fn, [draw(*s) for s in shapes], draw(BATCH, TIME, WIDTH)
    )
    assert set(flat.products) == products
    made = jax.jit(lambda *arguments: flat.run(arguments, widens=False))(*arguments)
    jax.tree.map(np.testing.assert_array_equal, made, wanted)


def test_they_can_be_made_later_from_their_operands() -> None:
    flat, (arguments, wanted) = backward_of(
        dense, [draw(WIDTH, WIDTH), draw(WIDTH, WIDTH)], draw(BATCH, TIME, WIDTH)
    )
    rest, operands = flat.without_products(arguments)
    assert len(rest) == 1  # the cotangent of x
    assert len(flat.operands) == 4
    assert len(flat.computed) == 3, "the cotangent that came in is kept, not returned"
    made = flat.make(operands, widens=False)
    for j in flat.products:
        np.testing.assert_allclose(
            np.asarray(made[j], np.float32), np.asarray(wanted[j], np.float32), rtol=2e-2, atol=2e-2
        )


def test_widened_products_are_not_rounded() -> None:
    weights, x = [draw(WIDTH, HEADS, WIDTH // HEADS)], draw(BATCH, TIME, WIDTH)
    flat, (arguments, _) = backward_of(heads, weights, x)
    (gradient,) = flat.run(arguments, widens=True)[:1]
    assert gradient.dtype == jnp.float32
    assert gradient.shape == weights[0].shape
    exact = jnp.einsum("btw,bthd->whd", x.astype(jnp.float32), arguments[-1].astype(jnp.float32))
    np.testing.assert_allclose(gradient, exact, rtol=1e-5, atol=1e-5)


def checkpointed(weights: list[Any], x: Any) -> Any:
    return jax.checkpoint(dense)(weights, jnp.tanh(x))


def test_a_checkpoint_of_the_users_keeps_its_barrier() -> None:
    """Backward computes again, behind the barrier that JAX's own lowering has."""
    weights = [draw(WIDTH, WIDTH), draw(WIDTH, WIDTH)]
    flat, (arguments, wanted) = backward_of(checkpointed, weights, draw(BATCH, TIME, WIDTH))
    names = [op.name for op in flat.program.ops]
    assert names.count("optimization_barrier") == 1
    assert "dot_general" in names[names.index("optimization_barrier") :]
    assert set(flat.products) == {0, 1}
    made = jax.jit(lambda *arguments: flat.run(arguments, widens=False))(*arguments)
    jax.tree.map(np.testing.assert_array_equal, made, wanted)
