"""Staged and unstaged training side by side, and the difference between the two."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from numpy.typing import NDArray

from layerwise_jax.pipeline import Pipeline

ValueAndGrad = Callable[..., tuple[Any, Any]]


class Losses(NamedTuple):
    """Losses of one step, of both runs."""

    staged: float
    unstaged: float


class Run:
    """Training run: parameters and optimizer state, advanced one batch at a time."""

    def __init__(
        self,
        value_and_grad: ValueAndGrad,
        params: Any,
        batch: Any,
        optimizer: optax.GradientTransformation,
    ):
        """Compile the step for batches of the shape of `batch`. `params` are donated to it."""
        self.params = params
        self.optimizer_state = jax.jit(optimizer.init)(params)
        step = make_step(value_and_grad, optimizer)
        self._step = step.lower(self.params, self.optimizer_state, batch).compile()

    def advance(self, batch: Any) -> float:
        """Train on one batch; returns the loss before the update."""
        self.params, self.optimizer_state, loss = self._step(
            self.params, self.optimizer_state, batch
        )
        return float(loss)


def make_step(value_and_grad: ValueAndGrad, optimizer: optax.GradientTransformation) -> Any:
    """Jitted training step; it donates the parameters and the optimizer state."""

    def step(params: Any, optimizer_state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        loss, grads = value_and_grad(params, batch)
        updates, optimizer_state = optimizer.update(grads, optimizer_state, params)
        return optax.apply_updates(params, updates), optimizer_state, loss

    return jax.jit(step, donate_argnums=(0, 1))


def train_both(staged: Run, unstaged: Run, batches: NDArray[np.int32]) -> Iterator[Losses]:
    """Advance both runs batch by batch, yielding the losses of each step."""
    for batch in batches:
        yield Losses(staged.advance(batch), unstaged.advance(batch))


class Difference(NamedTuple):
    """Largest differences between the two runs.

    Attributes:
      loss: over all steps, relative to the unstaged loss.
      params: over all trained parameters, relative to the largest entry of the parameter.
      worst: path of the parameter with the largest difference.
    """

    loss: float
    params: float
    worst: str

    @property
    def largest(self) -> float:
        return max(self.loss, self.params)


def compare(losses: Sequence[Losses], pipeline: Pipeline, staged: Run, unstaged: Run) -> Difference:
    """Difference between the runs: over all losses, and over the parameters that they hold now."""
    of_losses = max(abs(loss.staged - loss.unstaged) / abs(loss.unstaged) for loss in losses)
    worst, of_params = largest_difference(pipeline.gather(staged.params), unstaged.params)
    return Difference(of_losses, of_params, worst)


def largest_difference(actual: Any, expected: Any) -> tuple[str, float]:
    """Path of the leaf that differs most, and its difference relative to its largest entry.

    Both trees have the same structure and shapes. A NaN counts as an infinite difference.
    """
    differences = jax.tree_util.tree_map(_relative_difference, actual, expected)
    leaves = jax.tree_util.tree_leaves_with_path(differences)
    path, largest = max(leaves, key=lambda item: item[1])
    return jax.tree_util.keystr(path, simple=True, separator="/"), largest


def _relative_difference(actual: Any, expected: Any) -> float:
    actual = np.asarray(actual, np.float64)
    expected = np.asarray(expected, np.float64)
    scale = max(np.max(np.abs(expected)), np.finfo(np.float64).tiny)
    difference = np.max(np.abs(actual - expected)) / scale
    return float("inf") if np.isnan(difference) else float(difference)
