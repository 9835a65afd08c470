"""Models in plain JAX, each with a feature of a program that a pass over its equations can get
wrong.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tests.support.zoo_case import (
    VOCABULARY,
    WIDTH,
    Case,
    draw_features,
    draw_tokens,
    draw_weights,
    regression,
)

DEPTH = 8

Weights = dict[str, jax.Array]


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def draw_layers() -> list[Weights]:
    """Eight square layers, each a dict of weight and bias."""
    return draw_weights(
        [{"weight": shape(WIDTH, WIDTH), "bias": shape(WIDTH)} for _ in range(DEPTH)]
    )


def dense(layer: Weights, x: jax.Array) -> jax.Array:
    return x @ layer["weight"] + layer["bias"]


def chain(
    layer_fn: Callable[[Weights, jax.Array], jax.Array],
) -> Callable[[list[Weights], jax.Array], jax.Array]:
    """The function of (layers, x) that sends x through `layer_fn` of each layer in turn."""

    def fn(layers: list[Weights], x: jax.Array) -> jax.Array:
        for layer in layers:
            x = layer_fn(layer, x)
        return x

    return fn


tanh_chain = chain(lambda layer, x: jnp.tanh(dense(layer, x)))


def odd_outputs() -> Case:
    def fn(params: dict[str, Any], x: jax.Array) -> dict[str, jax.Array]:
        middle = tanh_chain(params["layers"][:4], x)
        last = tanh_chain(params["layers"][4:], middle)
        constant = jnp.full((x.shape[0], 2), 0.5)
        return {"last": last, "again": last, "early": middle, "input": x, "constant": constant}

    def loss_of(outputs: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(outputs["last"] - outputs["input"])) + jnp.mean(outputs["early"])

    params = {"layers": draw_layers(), "unused": draw_weights(shape(3, 3))}
    notes = "a constant, an input, an early and a repeated output; a parameter that nothing uses"
    return Case("odd_outputs", fn, params, (draw_features(WIDTH),), loss_of, notes=notes)


@jax.custom_vjp
def scale_gradient(x: jax.Array) -> jax.Array:
    """The identity, with half of the gradient: inlined, it would have all of it."""
    return x * 1.0


scale_gradient.defvjp(lambda x: (scale_gradient(x), None), lambda _, gradient: (0.5 * gradient,))


def custom_derivatives() -> Case:
    layers = draw_layers()
    # Unit 0 of each layer is exactly zero, where relu's own rule gives 0 and its inlined maximum
    # would give 0.5.
    layers = [
        {"weight": layer["weight"].at[:, 0].set(0), "bias": layer["bias"].at[0].set(0)}
        for layer in layers
    ]
    fn = chain(lambda layer, x: 0.5 * (x + scale_gradient(jax.nn.relu(dense(layer, x)))))
    return regression(
        "custom_derivatives", fn, layers, draw_features(WIDTH), notes="custom_jvp and custom_vjp"
    )


def branches() -> Case:
    def with_bias(layer: Weights, x: jax.Array) -> jax.Array:
        return jnp.tanh(dense(layer, x))

    def without_bias(layer: Weights, x: jax.Array) -> jax.Array:
        return jnp.sin(x @ layer["weight"])

    def fn(params: dict[str, Any], tokens: jax.Array, step: jax.Array) -> jax.Array:
        x = params["embed"][tokens]
        for index, layer in enumerate(params["layers"]):
            x = x + jax.lax.cond((step + index) % 2 == 0, with_bias, without_bias, layer, x)
        return x

    params = {"embed": draw_weights(shape(VOCABULARY, WIDTH)), "layers": draw_layers()}
    inputs = (draw_tokens(), jnp.int32(3))
    return regression(
        "branches",
        fn,
        params,
        *inputs,
        in_axes=(0, None),
        notes="a cond in each layer, integer inputs",
    )


def bfloat16() -> Case:
    def layer_fn(layer: Weights, x: jax.Array) -> jax.Array:
        weight, bias = layer["weight"].astype(jnp.bfloat16), layer["bias"].astype(jnp.bfloat16)
        return jnp.tanh(x @ weight + bias)

    def fn(layers: list[Weights], x: jax.Array) -> jax.Array:
        return chain(layer_fn)(layers, x.astype(jnp.bfloat16)).astype(jnp.float32)

    notes = "float32 weights cast in each layer; activations cross as bfloat16"
    return regression(
        "bfloat16", fn, draw_layers(), draw_features(WIDTH), notes=notes, tolerance=3e-2
    )


def indexed() -> Case:
    def fn(params: Weights, x: jax.Array) -> jax.Array:
        for index in range(DEPTH):
            x = jnp.tanh(x @ params["weight"][index] + params["bias"][index])
        return x

    params = draw_weights({"weight": shape(DEPTH, WIDTH, WIDTH), "bias": shape(DEPTH, WIDTH)})
    return regression(
        "indexed", fn, params, draw_features(WIDTH), notes="one stack of weights, indexed by a loop"
    )


def inner_loops() -> Case:
    def layer_fn(layer: Weights, x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(dense(layer, x)), x)

    notes = "a static loop with one weight in each layer: a scan, but not one over layers"
    return regression(
        "inner_loops", chain(layer_fn), draw_layers(), draw_features(WIDTH), notes=notes
    )


def checkpointed() -> Case:
    fn = jax.checkpoint(tanh_chain, policy=jax.checkpoint_policies.dots_saveable)
    return regression(
        "checkpointed",
        fn,
        draw_layers(),
        draw_features(WIDTH),
        notes="the whole model, with a policy",
    )


def jitted() -> Case:
    fn = jax.jit(chain(jax.jit(lambda layer, x: jnp.tanh(dense(layer, x)))))
    return regression(
        "jitted",
        fn,
        draw_layers(),
        draw_features(WIDTH),
        notes="the whole model, and each layer in it",
    )
