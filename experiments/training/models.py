"""Models of the training experiment in Flax Linen: equal blocks, cut between any two."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

GROUPS = 4


class FeedForward(nn.Module):
    """Two dense layers with `hidden` features between them and a residual connection."""

    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float[batch, width] to the same shape."""
        return x + nn.Dense(x.shape[-1], name="down")(nn.gelu(nn.Dense(self.hidden, name="up")(x)))


class MLP(nn.Module):
    """One block per entry of `hidden`, each under `jax.checkpoint` if `checkpointed`."""

    hidden: Sequence[int]
    checkpointed: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float[batch, width] to the same shape."""
        block: Any = nn.remat(FeedForward) if self.checkpointed else FeedForward
        for index, hidden in enumerate(self.hidden):
            x = block(hidden, name=f"block_{index}")(x)
        return x


def mean_square(model: nn.Module) -> Callable[[Any, jax.Array, jax.Array], jax.Array]:
    """Mean squared error between the model's output and a target, both float[batch, width]."""

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean((jnp.asarray(model.apply(params, x)) - y) ** 2)

    return loss


class Residual(nn.Module):
    """Two normalised 3 x 3 convolutions with a residual connection, projected if the shape
    changes.
    """

    channels: int
    stride: int
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float[batch, height, width, channels] to float[batch, height / stride, width / stride,
        self.channels].
        """
        convolve: Callable[..., Any] = partial(nn.Conv, self.channels, use_bias=False)
        y = nn.relu(
            self.norm(name="norm_0")(convolve((3, 3), strides=self.stride, name="conv_0")(x))
        )
        y = self.norm(name="norm_1")(convolve((3, 3), name="conv_1")(y))
        if x.shape != y.shape:
            x = convolve((1, 1), strides=self.stride, name="project")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Image classifier.

    Attributes:
      classes: classes that there are.
      channels: of each block; where they change, the image is halved.
      norm: "group" normalises each image by itself, "batch" by the statistics of the batch, which
        it also averages.
    """

    classes: int
    channels: Sequence[int]
    norm: Literal["group", "batch"] = "group"

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """float[batch, height, width, 3] to logits, float[batch, classes]."""
        norm: Callable[..., nn.Module] = partial(nn.GroupNorm, num_groups=GROUPS)
        if self.norm == "batch":
            norm = partial(nn.BatchNorm, use_running_average=False, momentum=0.9)
        x = nn.Conv(self.channels[0], (3, 3), use_bias=False, name="stem")(images)
        before = self.channels[0]
        for index, channels in enumerate(self.channels):
            x = Residual(channels, 1 if channels == before else 2, norm, name=f"block_{index}")(x)
            before = channels
        return nn.Dense(self.classes, name="head")(x.mean((1, 2)))


def classification(model: nn.Module) -> Callable[[Any, jax.Array, jax.Array], jax.Array]:
    """Mean cross-entropy (nats) of int[batch] labels; images are float[batch, height, width, 3]."""

    def loss(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = jnp.asarray(model.apply(params, images))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss


def classification_with_statistics(
    model: nn.Module,
) -> Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, Any]]:
    """The same for a model with batch norm, with its new running averages."""

    def loss(variables: Any, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
        logits, updated = model.apply(variables, images, mutable=["batch_stats"])
        value = optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits), labels).mean()
        return value, updated["batch_stats"]

    return loss
