"""Two training problems, each with a staged and an unstaged step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from experiments.training.models import ResNet, classification_with_statistics
from experiments.training.subjects import split
from layerwise_jax import Pipeline, build_pipeline
from layerwise_jax.examples import GPT, next_token_loss
from layerwise_jax.mesh import STAGE
from layerwise_jax.trace import trace_layers

STAGES = 4
MICROBATCHES = 8
STATISTICS = "batch_stats"

# (params, optimiser state, *batch) to (params, optimiser state, loss).
Step = Callable[..., tuple[Any, Any, jax.Array]]


@dataclass(frozen=True, eq=False)
class Problem:
    """Training problem with its staged and unstaged step.

    Attributes:
      title: what it is.
      params: what both runs start from.
      optimiser: of both.
      batch: of a step, by its number.
      pipeline: the staged loss.
      staged, unstaged: the steps.
    """

    title: str
    params: Any
    optimiser: optax.GradientTransformation
    batch: Callable[[int], tuple[jax.Array, ...]]
    pipeline: Pipeline
    staged: Step
    unstaged: Step


def cut(
    loss: Callable[..., Any], params: Any, batch: tuple[jax.Array, ...], **choices: Any
) -> Pipeline:
    """The loss as a pipeline of `STAGES` stages of about equal counts of layers, trained by
    1F1B.
    """
    layers = trace_layers(loss, params, *(x[: len(x) // MICROBATCHES] for x in batch))
    boundaries = np.linspace(0, len(layers), STAGES + 1).round().astype(int).tolist()
    mesh = Mesh(np.array(jax.devices()[:STAGES]), (STAGE,))
    return build_pipeline(layers, tuple(boundaries), mesh, MICROBATCHES, reduce="mean", **choices)


def gpt_problem() -> Problem:
    """A GPT: the whole batch unstaged, its microbatches staged."""
    model = GPT(vocabulary=128, width=64, depth=6, heads=4, context=32)
    loss = next_token_loss(model)

    def batch(step: int) -> tuple[jax.Array, ...]:
        """Ramps modulo the vocabulary with random slopes."""
        start, slope = jax.random.randint(jax.random.key(step), (2, 16, 1), 1, 128)
        return ((start + (slope % 7) * jnp.arange(model.context + 1)) % model.vocabulary,)

    params = jax.jit(model.init)(jax.random.key(0), batch(0)[0][:, :-1])
    optimiser = optax.adam(1e-3, eps=1e-5)
    pipeline = cut(loss, params, batch(0))

    def step_by(value_and_grad: Callable[..., Any]) -> Step:
        def step(params: Any, state: Any, *inputs: jax.Array) -> tuple[Any, Any, jax.Array]:
            value, grads = value_and_grad(params, *inputs)
            updates, state = optimiser.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value

        return step

    title = f"GPT, {model.depth} blocks of width {model.width}, Adam"
    staged, unstaged = step_by(pipeline.value_and_grad), step_by(jax.value_and_grad(loss))
    return Problem(title, params, optimiser, batch, pipeline, staged, unstaged)


def resnet_problem() -> Problem:
    """A ResNet with batch norm: microbatches in sequence, staged and unstaged, each with its
    statistics.
    """
    model = ResNet(classes=4, channels=(8, 8, 16, 16), norm="batch")
    loss = classification_with_statistics(model)

    def batch(step: int) -> tuple[jax.Array, ...]:
        """Images: a pattern for each class, with noise."""
        labels = jnp.arange(32) % model.classes
        patterns = jax.random.normal(jax.random.key(0), (model.classes, 8, 8, 3))
        return patterns[labels] + 2 * jax.random.normal(
            jax.random.key(step + 1), (32, 8, 8, 3)
        ), labels

    variables = jax.jit(model.init)(jax.random.key(0), batch(0)[0])
    optimiser = optax.sgd(0.05, momentum=0.9)
    pipeline = cut(
        loss,
        variables,
        batch(0),
        state=lambda outputs: {STATISTICS: outputs[1]},
        batch_statistics="per_microbatch",
    )

    def staged(params: Any, state: Any, *inputs: jax.Array) -> tuple[Any, Any, jax.Array]:
        (((value, _), params), grads) = pipeline.value_and_grad(params, *inputs)
        updates, state = optimiser.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    title = f"ResNet with batch norm, {len(model.channels)} blocks, SGD with momentum"
    return Problem(
        title,
        variables,
        optimiser,
        batch,
        pipeline,
        staged,
        accumulating_with_statistics(loss, optimiser),
    )


def accumulating_with_statistics(
    loss: Callable[..., Any], optimiser: optax.GradientTransformation
) -> Step:
    """Unstaged step: gradients accumulated over microbatches, running averages handed on."""

    def step(variables: Any, state: Any, *inputs: jax.Array) -> tuple[Any, Any, jax.Array]:
        def add(so_far: Any, microbatch: Any) -> Any:
            variables, total, grads = so_far
            (value, statistics), more = jax.value_and_grad(loss, has_aux=True)(
                variables, *microbatch
            )
            grads = jax.tree.map(lambda a, b: a + b / MICROBATCHES, grads, more)
            return (
                {**variables, STATISTICS: statistics},
                total + value / MICROBATCHES,
                grads,
            ), None

        start = (variables, jnp.zeros(()), jax.tree.map(jnp.zeros_like, variables))
        (variables, value, grads), _ = jax.lax.scan(add, start, split(inputs, MICROBATCHES))
        updates, state = optimiser.update(grads, state, variables)
        return optax.apply_updates(variables, updates), state, value

    return step


PROBLEMS: dict[str, Callable[[], Problem]] = {"GPT": gpt_problem, "ResNet": resnet_problem}


def train_both(problem: Problem, steps: int, progress: Callable[[], None]) -> dict[str, Any]:
    """Losses of both runs from the first step, and their largest relative difference."""
    runs = {
        "staged": (jax.jit(problem.staged), problem.pipeline.place(problem.params)),
        "unstaged": (jax.jit(problem.unstaged), problem.params),
    }
    losses = {}
    for name, (step, params) in runs.items():
        state, losses[name] = jax.jit(problem.optimiser.init)(params), []
        for number in range(steps):
            params, state, loss = step(params, state, *problem.batch(number))
            losses[name].append(float(loss))
            progress()
    apart = [abs(a - b) / abs(b) for a, b in zip(losses["staged"], losses["unstaged"], strict=True)]
    return {"title": problem.title, **losses, "apart_at_end": apart[-1], "most_apart": max(apart)}
