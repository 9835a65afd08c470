"""Residual network in Flax Linen, ResNet-50 by default; batch norm uses running averages."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class Bottleneck(nn.Module):
    """Residual block: convolutions of size 1, 3 and 1 with batch norm.

    The last convolution has four times the channels of the others.

    Attributes:
      width: channels of the first two convolutions.
      stride: stride of the second convolution.
      dtype: dtype of the computation; parameters are float32.
    """

    width: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float[batch, h, w, channels] to float[batch, h / stride, w / stride, 4 * self.width]."""
        convolve: Callable[..., Any] = partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm: Callable[..., Any] = partial(nn.BatchNorm, use_running_average=True, dtype=self.dtype)
        y = nn.relu(norm()(convolve(self.width, (1, 1))(x)))
        y = nn.relu(norm()(convolve(self.width, (3, 3), strides=self.stride)(y)))
        y = norm()(convolve(4 * self.width, (1, 1))(y))
        if x.shape != y.shape:
            x = norm()(convolve(4 * self.width, (1, 1), strides=self.stride)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Image classifier.

    Attributes:
      classes: number of classes.
      width: channels of the first convolution.
      depths: blocks per resolution; (3, 4, 6, 3) is ResNet-50.
      dtype: dtype of the computation; parameters are float32.
    """

    classes: int = 1000
    width: int = 64
    depths: Sequence[int] = (3, 4, 6, 3)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """float[batch, height, width, 3] to logits, float[batch, classes]."""
        x = nn.Conv(self.width, (7, 7), strides=2, use_bias=False, dtype=self.dtype, name="stem")(
            images
        )
        x = nn.relu(nn.BatchNorm(use_running_average=True, dtype=self.dtype, name="stem_norm")(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for resolution, depth in enumerate(self.depths):
            for index in range(depth):
                stride = 2 if resolution > 0 and index == 0 else 1
                name = f"block_{sum(self.depths[:resolution]) + index}"
                x = Bottleneck(self.width * 2**resolution, stride, self.dtype, name=name)(x)
        return nn.Dense(self.classes, dtype=self.dtype, name="head")(x.mean((1, 2)))
