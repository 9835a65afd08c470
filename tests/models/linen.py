"""Linen models that are not transformers."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tests.support.zoo_case import (
    TIME,
    VOCABULARY,
    WIDTH,
    Case,
    draw_features,
    draw_tokens,
    draw_weights,
    regression,
)


def variables_of(model: nn.Module, *inputs: Any) -> Any:
    """The variables of `model`, drawn for the shapes that `inputs` give it."""
    return draw_weights(jax.eval_shape(model.init, jax.random.key(0), *inputs))


class MLP(nn.Module):
    widths: Sequence[int]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in self.widths[:-1]:
            x = nn.gelu(nn.Dense(width)(x))
        return nn.Dense(self.widths[-1])(x)


def mlp() -> Case:
    model, x = MLP((24, 8, 32, 16, 5, 40, 12, 9, 3)), draw_features(7)
    return regression("mlp", model.apply, variables_of(model, x), x, notes="uneven widths")


class CNN(nn.Module):
    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        x = image
        for channels, stride in ((4, 1), (6, 2), (6, 1), (8, 2), (8, 1), (6, 1)):
            x = nn.relu(nn.Conv(channels, (3, 3), (stride, stride))(x))
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(5)(nn.relu(nn.Dense(WIDTH)(x)))


def cnn() -> Case:
    model, image = CNN(), draw_features(8, 8, 3)
    return regression("cnn", model.apply, variables_of(model, image), image)


class ResidualBlock(nn.Module):
    channels: int
    stride: int
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        strides = (self.stride, self.stride)
        y = nn.Conv(self.channels, (3, 3), strides, use_bias=False)(x)
        y = nn.relu(nn.BatchNorm(use_running_average=not self.train)(y))
        y = nn.Conv(self.channels, (3, 3), use_bias=False)(y)
        y = nn.BatchNorm(use_running_average=not self.train)(y)
        if x.shape != y.shape:
            x = nn.Conv(self.channels, (1, 1), strides, use_bias=False)(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(4, (3, 3))(image))
        for channels, stride in ((4, 1), (4, 1), (6, 2), (6, 1)):
            x = ResidualBlock(channels, stride, self.train)(x)
        return nn.Dense(5)(jnp.mean(x, axis=(1, 2)))


def resnet() -> Case:
    model, image = ResNet(train=False), draw_features(8, 8, 3)
    return regression(
        "resnet", model.apply, variables_of(model, image), image, notes="batch norm in evaluation"
    )


def resnet_train() -> Case:
    model, image = ResNet(train=True), draw_features(8, 8, 3)

    def fn(variables: Any, image: jax.Array) -> Any:
        return model.apply(variables, image, mutable=["batch_stats"])

    return regression(
        "resnet_train",
        fn,
        variables_of(model, image),
        image,
        state=lambda outputs: outputs[1],
        mixes_batch=True,
        notes=(
            "batch norm in training: statistics of the batch, new running averages as a "
            "second output"
        ),
    )


class UNet(nn.Module):
    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        x, skips = image, []
        for channels in (4, 6, 8):
            x = nn.silu(nn.Conv(channels, (3, 3))(x))
            skips.append(x)
            x = nn.silu(nn.Conv(channels, (3, 3), (2, 2))(x))
        x = nn.silu(nn.Conv(8, (3, 3))(x))
        for channels in (8, 6, 4):
            x = nn.ConvTranspose(channels, (2, 2), (2, 2))(x)
            x = nn.silu(nn.Conv(channels, (3, 3))(jnp.concatenate([x, skips.pop()], axis=-1)))
        return nn.Conv(image.shape[-1], (1, 1))(x)


def unet() -> Case:
    model, image = UNet(), draw_features(8, 8, 3)
    return regression(
        "unet", model.apply, variables_of(model, image), image, notes="skips as long as the model"
    )


class MixtureOfExperts(nn.Module):
    """Each token goes to its own `top` experts; all experts are computed and the others' outputs
    weighed by zero.
    """

    experts: int = 4
    top: int = 2

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        scores, chosen = jax.lax.top_k(nn.Dense(self.experts, name="router")(x), self.top)
        gates = jnp.einsum(
            "btk,btke->bte", nn.softmax(scores), jax.nn.one_hot(chosen, self.experts)
        )
        up = self.param("up", nn.initializers.lecun_normal(), (self.experts, width, 2 * width))
        down = self.param("down", nn.initializers.lecun_normal(), (self.experts, 2 * width, width))
        hidden = nn.gelu(jnp.einsum("btd,edh->bteh", x, up))
        return jnp.einsum("bteh,ehd,bte->btd", hidden, down, gates)


class ExpertNet(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(VOCABULARY, WIDTH)(tokens)
        for _ in range(4):
            x = x + nn.Dense(WIDTH)(nn.LayerNorm()(x))
            x = x + MixtureOfExperts()(nn.LayerNorm()(x))
        return nn.Dense(VOCABULARY)(x)


def mixture_of_experts() -> Case:
    model, tokens = ExpertNet(), draw_tokens()
    return regression(
        "mixture_of_experts", model.apply, variables_of(model, tokens), tokens, notes="top 2 of 4"
    )


class TwoTowers(nn.Module):
    @nn.compact
    def __call__(self, image: jax.Array, tokens: jax.Array) -> jax.Array:
        seen, read = image, nn.Embed(VOCABULARY, WIDTH)(tokens)
        for _ in range(4):
            seen = nn.relu(nn.Conv(6, (3, 3))(seen))
        for _ in range(3):
            read = nn.LayerNorm()(read + nn.gelu(nn.Dense(WIDTH)(read)))
        met = jnp.concatenate(
            [nn.Dense(WIDTH)(jnp.mean(seen, axis=(1, 2))), jnp.mean(read, axis=1)], axis=-1
        )
        return nn.Dense(3)(nn.gelu(nn.Dense(WIDTH)(met)))


def two_towers() -> Case:
    model, image, tokens = TwoTowers(), draw_features(6, 6, 3), draw_tokens()
    return regression("two_towers", model.apply, variables_of(model, image, tokens), image, tokens)


class StackedLSTM(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(WIDTH)(x)
        for _ in range(8):
            hidden: Any = nn.RNN(nn.OptimizedLSTMCell(WIDTH))(x)
            x = x + hidden
        return nn.Dense(3)(x)


def lstm() -> Case:
    model, x = StackedLSTM(), draw_features(TIME, 5)
    return regression(
        "lstm", model.apply, variables_of(model, x), x, notes="each layer is a scan over time"
    )
