"""Stages of usual kinds as functions of (weights, input), with the types of both."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from layerwise_jax.examples import gpt, moe, resnet

HALF = jnp.float16
VOCABULARY = 16384


class StageProgram(NamedTuple):
    """A stage: `fn(weights, x)`, and `jax.ShapeDtypeStruct` of its arguments."""

    name: str
    fn: Callable[[Any, Any], Any]
    weights: Any
    x: Any


def stage_programs() -> Iterator[StageProgram]:
    """All stages: forward, and forward with the gradients of weights and input."""
    for stage in forward_stages():
        yield stage._replace(name=f"{stage.name}, forward")
        yield stage._replace(
            name=f"{stage.name}, forward and backward", fn=with_gradients(stage.fn)
        )


def forward_stages() -> Iterator[StageProgram]:
    yield StageProgram("MLP 1024-4096, 64 rows", mlp, mlp_weights(1024, 4096), half(64, 1024))
    yield StageProgram("MLP 2048-8192, 512 rows", mlp, mlp_weights(2048, 8192), half(512, 2048))
    yield of_module(
        "transformer block, 2 x 512 tokens", gpt.Block(heads=16, dtype=HALF), half(2, 512, 1024)
    )
    yield of_module(
        "bottleneck block, 8 x 28 x 28", resnet.Bottleneck(128, dtype=HALF), half(8, 28, 28, 512)
    )
    experts = moe.Block(heads=8, experts=8, hidden=1024, dtype=HALF)
    yield of_module("mixture of 8 experts, 2 x 512 tokens", experts, half(2, 512, 512))
    yield of_module(
        "LSTM scanned over 128 steps",
        nn.RNN(nn.OptimizedLSTMCell(512, dtype=HALF)),
        half(16, 128, 512),
    )
    tied = {"embedding": half(VOCABULARY, 512)}
    yield StageProgram(
        "tied head with loss, 2 x 256 tokens",
        tied_loss,
        tied,
        jax.ShapeDtypeStruct((2, 257), jnp.int32),
    )


def half(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, HALF)


def mlp_weights(width: int, hidden: int) -> dict[str, Any]:
    return {"up": half(width, hidden), "down": half(hidden, width)}


def mlp(weights: Any, x: jax.Array) -> jax.Array:
    return nn.gelu(x @ weights["up"]) @ weights["down"]


def tied_loss(weights: Any, tokens: jax.Array) -> jax.Array:
    """Loss of a model whose only layer is an embedding, used first and last."""
    logits = weights["embedding"][tokens[:, :-1]] @ weights["embedding"].T
    return optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), tokens[:, 1:]
    ).mean()


def of_module(name: str, module: nn.Module, x: jax.ShapeDtypeStruct) -> StageProgram:
    """Stage of a Linen module with weights in half precision."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    weights = jax.tree.map(lambda leaf: half(*leaf.shape), shapes)
    return StageProgram(name, lambda weights, x: module.apply(weights, x), weights, x)


def with_gradients(fn: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """`fn` with gradients of all differentiable arguments, for a cotangent of ones."""

    def both(weights: Any, x: jax.Array) -> Any:
        if jnp.issubdtype(x.dtype, jnp.inexact):
            out, pull = jax.vjp(fn, weights, x)
        else:
            out, pull = jax.vjp(lambda weights: fn(weights, x), weights)
        return out, pull(jnp.ones_like(out))

    return both
