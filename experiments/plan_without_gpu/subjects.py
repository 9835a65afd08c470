"""Models that are planned: real architectures in half precision, never held in memory."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from layerwise_jax.examples import GPT, MixtureOfExperts, ResNet

HALF = jnp.float16


class Subject(NamedTuple):
    """Function with abstract parameters and full batch, and its number of devices."""

    title: str
    fn: Callable[..., Any]
    params: Any
    batch: jax.ShapeDtypeStruct
    num_devices: int


def gpt() -> Subject:
    model = GPT(vocabulary=16384, width=512, depth=12, heads=8, context=256, dtype=HALF)
    return of_model("GPT, 12 blocks of width 512, 256 tokens", model, tokens(64, 256), 8)


def resnet() -> Subject:
    return of_model(
        "ResNet-50, 224 x 224", ResNet(dtype=HALF), jax.ShapeDtypeStruct((64, 224, 224, 3), HALF), 8
    )


def moe() -> Subject:
    model = MixtureOfExperts(
        vocabulary=8192, width=256, depth=8, heads=4, experts=8, hidden=1024, dtype=HALF
    )
    return of_model(
        "mixture of experts, 8 blocks of 8 experts, 256 tokens", model, tokens(64, 256), 8
    )


def small() -> Subject:
    """A GPT for tests."""
    model = GPT(vocabulary=256, width=64, depth=3, heads=2, context=32, dtype=HALF)
    return of_model("small GPT", model, tokens(8, 32), 2)


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "gpt": gpt,
    "resnet": resnet,
    "moe": moe,
    "small": small,
}


def large() -> Subject:
    """GPT-3's shape, one sequence per batch."""
    model = GPT(vocabulary=50257, width=12288, depth=96, heads=96, context=2048, dtype=HALF)
    return of_model("GPT, 96 blocks of width 12288, 2048 tokens", model, tokens(1, 2048), 1024)


def tokens(sequences: int, length: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((sequences, length), jnp.int32)


def of_model(
    title: str, model: nn.Module, batch: jax.ShapeDtypeStruct, num_devices: int
) -> Subject:
    """Subject of a Linen model with all variables in half precision."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, HALF), shapes)
    return Subject(title, model.apply, params, batch, num_devices)


def count_parameters(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))
