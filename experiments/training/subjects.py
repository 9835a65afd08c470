"""Training subjects: loss, parameters, batch and possible cuts.

Imported by the staged runs and by the rival, which has another JAX, so it imports neither.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.training.models import MLP, ResNet, classification, mean_square
from layerwise_jax.examples import GPT, next_token_loss

LEARNING_RATE = 1e-2


@dataclass(frozen=True, eq=False)
class Subject:
    """Training subject.

    Attributes:
      title: what it is, in a line.
      loss: (params, *inputs) to the mean loss over the examples of `inputs`.
      params: the parameters to start from.
      inputs: one microbatch.
      num_blocks: blocks that the model has; it is cut between two of them.
    """

    title: str
    loss: Callable[..., jax.Array]
    params: Any
    inputs: tuple[jax.Array, ...]
    num_blocks: int

    def batch(self, num_microbatches: int) -> tuple[jax.Array, ...]:
        """Inputs of `num_microbatches` distinct microbatches: (microbatches * examples, ...)."""
        return tuple(
            jnp.concatenate(
                [
                    jnp.roll(x, step, axis=-1) if x.ndim > 1 else x
                    for step in range(num_microbatches)
                ]
            )
            for x in self.inputs
        )

    def last_blocks(self, num_stages: int) -> tuple[str, ...]:
        """Names of the last block of every stage but the last; stages have equal counts of blocks.

        Raises:
          ValueError: the blocks do not divide evenly.
        """
        blocks, left = divmod(self.num_blocks, num_stages)
        if left or not blocks:
            raise ValueError(
                f"num_stages must be a divisor of the {self.num_blocks} blocks, got {num_stages}."
            )
        return tuple(f"block_{stage * blocks - 1}" for stage in range(1, num_stages))


def mlp(
    hidden: Sequence[int], width: int = 128, examples: int = 32, checkpointed: bool = False
) -> Subject:
    model = MLP(tuple(hidden), checkpointed)
    x = jax.random.normal(jax.random.key(0), (examples, width))
    title = (
        f"MLP, {len(hidden)} blocks of width {width}, {_spread(hidden)} inside, {examples} "
        "examples a microbatch"
    )
    return Subject(title, mean_square(model), _start(model, x), (x, jnp.sin(x)), len(hidden))


def gpt(depth: int = 8, width: int = 64, context: int = 64, sequences: int = 4) -> Subject:
    model = GPT(vocabulary=512, width=width, depth=depth, heads=4, context=context)
    tokens = jax.random.randint(jax.random.key(0), (sequences, context + 1), 0, 512)
    title = (
        f"GPT, {depth} blocks of width {width}, tied embedding, {sequences} x {context} "
        "tokens a microbatch"
    )
    return Subject(title, next_token_loss(model), _start(model, tokens[:, :-1]), (tokens,), depth)


def resnet(channels: Sequence[int], side: int = 16, images: int = 4) -> Subject:
    model = ResNet(classes=10, channels=tuple(channels))
    x = jax.random.normal(jax.random.key(0), (images, side, side, 3))
    labels = jnp.arange(images) % 10
    title = (
        f"ResNet, {len(channels)} blocks of {_spread(channels)} channels, group norm, "
        f"{images} images a microbatch"
    )
    return Subject(title, classification(model), _start(model, x), (x, labels), len(channels))


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "mlp": lambda: mlp([512] * 8),
    "gpt": gpt,
    "resnet": lambda: resnet([16] * 4 + [32] * 4),
    "small": lambda: mlp([16] * 4, width=8, examples=2),
}


def descend(params: Any, grads: Any) -> Any:
    """One step of plain gradient descent."""
    return jax.tree.map(lambda weight, grad: weight - LEARNING_RATE * grad, params, grads)


def split(inputs: Sequence[jax.Array], num_microbatches: int) -> tuple[jax.Array, ...]:
    """Inputs as (microbatches, examples per microbatch, ...)."""
    return tuple(x.reshape(num_microbatches, -1, *x.shape[1:]) for x in inputs)


def unstaged_step(subject: Subject) -> Callable[..., Any]:
    """Step from (params, *batch) to (params, loss) with the gradient of the whole batch."""

    def step(params: Any, *inputs: jax.Array) -> tuple[Any, jax.Array]:
        loss, grads = jax.value_and_grad(subject.loss)(params, *inputs)
        return descend(params, grads), loss

    return step


def accumulating_step(subject: Subject, num_microbatches: int) -> Callable[..., Any]:
    """Step from (params, *batch) to (params, loss), gradients accumulated over microbatches."""

    def step(params: Any, *inputs: jax.Array) -> tuple[Any, jax.Array]:
        def add(
            so_far: tuple[jax.Array, Any], microbatch: tuple[jax.Array, ...]
        ) -> tuple[tuple[jax.Array, Any], None]:
            made = jax.value_and_grad(subject.loss)(params, *microbatch)
            return jax.tree.map(lambda total, x: total + x / num_microbatches, so_far, made), None

        start = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        (loss, grads), _ = jax.lax.scan(add, start, split(inputs, num_microbatches))
        return descend(params, grads), loss

    return step


def _start(model: nn.Module, x: jax.Array) -> Any:
    return jax.jit(model.init)(jax.random.key(1), x)


def _spread(sizes: Sequence[int]) -> str:
    return str(sizes[0]) if len(set(sizes)) == 1 else f"{min(sizes)} to {max(sizes)}"
