"""The same training twice, staged and unstaged, and how far the two come apart."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from numpy.typing import NDArray

from layerwise_jax.pipeline import Pipeline

ValueAndGrad = Callable[..., tuple[Any, Any]]


class Losses(NamedTuple):
    """The loss of one step, of both runs."""

    staged: float
    unstaged: float


class Run:
    """One training run: parameters and optimiser state, advanced a batch at a time."""

    def __init__(
        self,
        value_and_grad: ValueAndGrad,
        params: Any,
        batch: Any,
        optimiser: optax.GradientTransformation,
    ):
        """Compile the step for batches of the shape of `batch`."""
        self.params = params
        self.optimiser_state = jax.jit(optimiser.init)(params)
        step = make_step(value_and_grad, optimiser)
        self._step = step.lower(self.params, self.optimiser_state, batch).compile()

    def advance(self, batch: Any) -> float:
        """Train on one batch; its loss before the update."""
        self.params, self.optimiser_state, loss = self._step(
            self.params, self.optimiser_state, batch
        )
        return float(loss)


def make_step(value_and_grad: ValueAndGrad, optimiser: optax.GradientTransformation) -> Any:
    """One step of training as one compiled program, which writes over the parameters and the
    optimiser's state.
    """

    def step(params: Any, optimiser_state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        loss, grads = value_and_grad(params, batch)
        updates, optimiser_state = optimiser.update(grads, optimiser_state, params)
        return optax.apply_updates(params, updates), optimiser_state, loss

    return jax.jit(step, donate_argnums=(0, 1))


def train_both(staged: Run, unstaged: Run, batches: NDArray[np.int32]) -> Iterator[Losses]:
    """Advance both runs batch by batch, from the first."""
    for batch in batches:
        yield Losses(staged.advance(batch), unstaged.advance(batch))


class Difference(NamedTuple):
    """The largest differences between the two runs.

    Attributes:
      loss: over all steps, relative to the unstaged loss.
      params: over all parameters at the end, relative to the largest entry of the parameter.
      worst: the parameter where that is.
    """

    loss: float
    params: float
    worst: str

    @property
    def largest(self) -> float:
        return max(self.loss, self.params)


def compare(losses: list[Losses], pipeline: Pipeline, staged: Run, unstaged: Run) -> Difference:
    """How far the staged run has come from the unstaged one."""
    of_losses = max(abs(a - b) / abs(b) for a, b in losses)
    worst, of_params = largest_difference(pipeline.gather(staged.params), unstaged.params)
    return Difference(of_losses, of_params, worst)


def largest_difference(came: Any, wanted: Any) -> tuple[str, float]:
    """The leaf of two like trees that differs most, and by how much relative to its largest entry.

    NaN anywhere counts as infinitely far.
    """
    apart = jax.tree_util.tree_map(_relative_difference, came, wanted)
    path, largest = max(jax.tree_util.tree_leaves_with_path(apart), key=lambda item: item[1])
    return jax.tree_util.keystr(path, simple=True, separator="/"), largest


def _relative_difference(came: Any, wanted: Any) -> float:
    came, wanted = np.asarray(came, np.float64), np.asarray(wanted, np.float64)
    share = np.max(np.abs(came - wanted)) / max(np.max(np.abs(wanted)), np.finfo(np.float64).tiny)
    return float("inf") if np.isnan(share) else float(share)
