"""A case of the zoo: a model with its weights, inputs and loss.

Weights and inputs are drawn by numpy from the shapes alone, so that making a case compiles nothing.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr, tree_map_with_path

BATCH = 8
TIME = 6
VOCABULARY = 13
WIDTH = 16


@dataclass(frozen=True)
class Case:
    """A model to run staged and unstaged.

    The leading axis of each batched input and of each output is the batch. The loss is a mean over
    the batch of losses of one example each, so that the mean over microbatches of equal size is the
    loss of the whole batch.
    """

    name: str
    fn: Callable[..., Any]
    """Batched outputs of (params, *inputs)."""
    params: Any
    inputs: tuple[Any, ...]
    loss_of: Callable[..., jax.Array]
    """A float32 scalar of (what `fn` returns, *inputs)."""
    reduce: str = "mean"
    in_axes: tuple[int | None, ...] | None = None
    """Per input: 0 if batched, None if every microbatch gets all of it. None: all are batched."""
    state: Callable[[Any], Any] | None = None
    """Picks the updated state, which has no batch axis, out of what `fn` returns."""
    notes: str = ""
    mixes_batch: bool = False
    """True if an example's result depends on the rest of its batch: microbatches differ."""
    tolerance: float = 1e-5
    """Difference allowed between two compiled forms of the model, absolute and relative to a leaf's
    largest entry.

    Absolute too, since some gradients are zero up to rounding: softmax ignores the bias of
    attention's keys.
    """

    def loss_fn(self, params: Any, *inputs: Any) -> jax.Array:
        return self.loss_of(self.fn(params, *inputs), *inputs)

    def loss_and_outputs(self, params: Any, *inputs: Any) -> tuple[jax.Array, Any]:
        outputs = self.fn(params, *inputs)
        return self.loss_of(outputs, *inputs), outputs

    def inputs_of(self, examples: slice) -> tuple[Any, ...]:
        """The inputs with only these examples of the batch."""
        axes = self.in_axes or (0,) * len(self.inputs)
        return tuple(
            x if axis is None else x[examples] for x, axis in zip(self.inputs, axes, strict=True)
        )


def regression(name: str, fn: Callable[..., Any], params: Any, *inputs: Any, **fields: Any) -> Case:
    """A case whose loss is the mean squared distance of `fn`'s outputs, or of the first of a tuple,
    from one.
    """

    def loss_of(outputs: Any, *inputs: Any) -> jax.Array:
        prediction = outputs[0] if isinstance(outputs, tuple) else outputs
        return jnp.mean(jnp.square(prediction - 1.0))

    return Case(name, fn, params, inputs, loss_of, **fields)


def language_model(
    name: str,
    fn: Callable[..., jax.Array],
    params: Any,
    *inputs: Any,
    target: int = 0,
    **fields: Any,
) -> Case:
    """A case whose loss is the cross-entropy of `fn`'s logits on the next token of
    `inputs[target]`.
    """

    def loss_of(logits: jax.Array, *inputs: Any) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(
            logits[:, :-1], inputs[target][:, 1:]
        ).mean()

    return Case(name, fn, params, inputs, loss_of, **fields)


def draw_weights(shapes: Any, seed: int = 0) -> Any:
    """Weights for a tree of `ShapeDtypeStruct`s.

    Biases, scales and running averages are random too: were they zeros and ones, a leaf that went
    to the wrong layer would go unseen.
    """
    random = np.random.default_rng(seed)

    def draw(path: Any, shape: jax.ShapeDtypeStruct) -> jax.Array:
        noise = random.standard_normal(shape.shape)
        if re.search(r"'(scale|var)'", keystr(path)):
            noise = 1.0 + 0.1 * np.abs(noise)
        elif re.search(r"'(bias|mean)'", keystr(path)):
            noise = 0.1 * noise
        else:
            noise = 0.25 * noise
        return jnp.asarray(noise, shape.dtype)

    return tree_map_with_path(draw, shapes)


def draw_features(*shape: int, seed: int = 1) -> jax.Array:
    """Normal float32 features with the batch as leading axis."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal((BATCH, *shape)), jnp.float32)


def draw_tokens(seed: int = 1) -> jax.Array:
    """Tokens, int32[BATCH, TIME], none of them zero: zero stands for padding."""
    return jnp.asarray(
        np.random.default_rng(seed).integers(1, VOCABULARY, (BATCH, TIME)), jnp.int32
    )
