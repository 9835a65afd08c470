"""Flax's `TrainState` and nnx's `Optimizer`, staged and unstaged: the same losses, in a few lines
each.

python -m experiments.training.flax_users
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app
from flax import nnx
from flax.training.train_state import TrainState
from rich.table import Table

import layerwise_jax as lw
from experiments import command
from layerwise_jax.examples import GPT, next_token_loss

STEPS = 20
TOLERANCE = 1e-4
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, eps=1e-5))


def train_state(
    model: nn.Module, batch: jax.Array, num_stages: int
) -> tuple[list[float], list[float]]:
    """Losses of a Linen model under `TrainState`: (staged, unstaged)."""
    loss_fn = next_token_loss(model)
    params = jax.jit(model.init)(jax.random.key(1), batch[:, :-1])

    def run(value_and_grad: Callable[..., Any], params: Any, tx: Any) -> list[float]:
        state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

        @jax.jit
        def step(state: TrainState) -> tuple[TrainState, jax.Array]:
            loss, grads = value_and_grad(state.params, batch)
            return state.apply_gradients(grads=grads), loss

        losses = []
        for _ in range(STEPS):
            state, loss = step(state)
            losses.append(float(loss))
        return losses

    pipeline = lw.layerwise(
        loss_fn, params, batch, reduce="mean", num_stages=num_stages, capacity=None
    )
    staged = run(pipeline.value_and_grad, pipeline.place(params), pipeline.optimizer(OPTIMIZER))
    return staged, run(jax.value_and_grad(loss_fn), params, OPTIMIZER)


def nnx_optimizer(num_stages: int) -> tuple[list[float], list[float]]:
    """Losses of an nnx model: (staged by `train_step`, unstaged under `nnx.Optimizer`)."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(32, 8)), jnp.float32)
    y = jnp.sin(x.sum(axis=1, keepdims=True))

    def mean_square(model: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean((model(x) - y) ** 2)

    model, twin = _mlp(), _mlp()
    graph, weights = nnx.split(model)
    pipeline = lw.layerwise(
        lambda weights, x, y: mean_square(nnx.merge(graph, weights), x, y),
        weights,
        x,
        y,
        reduce="mean",
        num_stages=num_stages,
        capacity=None,
    )
    step = pipeline.train_step(OPTIMIZER)
    staged = pipeline.place(weights)
    state = step.init(staged)
    optimizer = nnx.Optimizer(twin, OPTIMIZER, wrt=nnx.Param)
    ours, theirs = [], []
    for _ in range(STEPS):
        staged, state, loss = step(staged, state, x, y)
        ours.append(float(loss))
        loss, grads = nnx.value_and_grad(mean_square)(twin, x, y)
        optimizer.update(twin, grads)
        theirs.append(float(loss))
    nnx.update(model, pipeline.gather(staged))  # the user's model again, trained
    np.testing.assert_allclose(model(x), twin(x), atol=1e-4)
    return ours, theirs


def _mlp() -> nnx.Sequential:
    rngs, sizes = nnx.Rngs(0), [8, 64, 64, 64, 1]
    layers = [nnx.Linear(a, b, rngs=rngs) for a, b in pairwise(sizes)]
    return nnx.Sequential(
        *[part for layer in layers[:-1] for part in (layer, jnp.tanh)], layers[-1]
    )


def compare(num_stages: int = 4) -> dict[str, tuple[list[float], list[float]]]:
    """(staged, unstaged) losses by name of the interface."""
    batch = jax.random.randint(jax.random.key(0), (16, 33), 0, 128)
    model = GPT(vocabulary=128, width=32, depth=4, heads=4, context=32)
    return {
        "flax TrainState": train_state(model, batch, num_stages),
        "nnx Optimizer": nnx_optimizer(num_stages),
    }


def main(argv: list[str]) -> None:
    """Print both losses; exits with 1 if they differ."""
    command.refuse_arguments(argv)
    lw.emulate_devices(4)
    table = Table("", "first loss", "last loss, staged", "unstaged", "apart")
    apart = []
    for name, (staged, unstaged) in compare().items():
        apart.append(max(abs(a - b) / abs(b) for a, b in zip(staged, unstaged, strict=True)))
        table.add_row(
            name, f"{staged[0]:.6f}", f"{staged[-1]:.6f}", f"{unstaged[-1]:.6f}", f"{apart[-1]:.1e}"
        )
    command.make_console().print(table)
    if max(apart) > TOLERANCE:
        raise SystemExit(
            f"Staged and unstaged losses are {max(apart):.1e} apart; {TOLERANCE:.0e} is allowed."
        )


if __name__ == "__main__":
    app.run(main)
