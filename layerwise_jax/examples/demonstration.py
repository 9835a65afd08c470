"""Demonstration of the quickstart: one model trained staged and unstaged, and compared."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import layerwise_jax as lw
from layerwise_jax.examples.gpt import GPT, next_token_loss
from layerwise_jax.examples.side_by_side import Difference, Losses, Run, compare, train_both
from layerwise_jax.examples.text import draw_batches, read_text
from layerwise_jax.pipeline import Pipeline

MIB = 2**20
LossFunction = Callable[[Any, Any], jax.Array]
LEARNING_RATE = 3e-3
# Adam divides a gradient by its size. Gradients below this are rounding errors, which Adam would
# otherwise enlarge to whole steps.
EPSILON = 1e-5
# float32 rounding over a few hundred steps stays below this by an order of magnitude.
TOLERANCE = 1e-4
OK, DIFFERENT, CANNOT_RUN = 0, 1, 2


@dataclass(frozen=True)
class Demonstration:
    """Options of the quickstart.

    Attributes:
      depth: blocks of the transformer.
      steps: training steps.
      stages: stages, one device each.
      batch: sequences in a batch.
      microbatches: microbatches in a batch; divides `batch`.
      capacity_mib: capacity of a stage in MiB; 0 means no capacity.
      emulated: emulate CPU devices; otherwise use the local devices.
      picture: file for the picture; its suffix selects the format.
    """

    depth: int
    steps: int
    stages: int
    batch: int
    microbatches: int
    capacity_mib: float
    emulated: bool
    picture: Path

    @property
    def model(self) -> GPT:
        return GPT(vocabulary=256, width=96, depth=self.depth, heads=4, context=64)


def run(options: Demonstration) -> int:
    """Train twice, report and draw; returns 0 (equal), 1 (different) or 2 (cannot run)."""
    console = make_console()
    model = options.model
    loss_fn = next_token_loss(model)
    try:
        if options.emulated:
            lw.emulate_devices(options.stages)
        text = read_text()
        batches = draw_batches(text, options.steps, options.batch, model.context + 1)
        params = jax.jit(model.init)(jax.random.key(0), batches[0, :, :-1])
        pipeline = build(options, loss_fn, params, batches[0])
    except (ValueError, RuntimeError) as error:
        console.print(f"Cannot run: {error}", style="red")
        return CANNOT_RUN
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    console.print(f"{len(text):,} bytes of text; {size:,} parameters; {options.stages} stages")
    console.print(str(pipeline.plan), highlight=False)
    losses, difference = train(pipeline, loss_fn, params, batches, console)
    draw_picture(pipeline, losses, options.picture, console)
    return report(losses, difference, console)


def make_console() -> Console:
    """Console that prints brackets as text: messages name extras such as layerwise-jax[plot]."""
    return Console(soft_wrap=True, markup=False)


def build(
    options: Demonstration, loss_fn: LossFunction, params: Any, batch: NDArray[np.int32]
) -> Pipeline:
    """The training loss as a pipeline."""
    return lw.layerwise(
        loss_fn,
        params,
        batch,
        num_stages=options.stages,
        num_microbatches=options.microbatches,
        capacity=round(options.capacity_mib * MIB) or None,
        reduce="mean",
    )


def train(
    pipeline: Pipeline,
    loss_fn: LossFunction,
    params: Any,
    batches: NDArray[np.int32],
    console: Console,
) -> tuple[list[Losses], Difference]:
    """Train staged and unstaged from the same parameters over the same batches, showing losses."""
    optimizer = optax.adamw(LEARNING_RATE, eps=EPSILON)
    with console.status("compiling the staged step"):
        staged = Run(pipeline.value_and_grad, pipeline.place(params), batches[0], optimizer)
    with console.status("compiling the unstaged step"):
        unstaged = Run(jax.value_and_grad(loss_fn), params, batches[0], optimizer)
    columns = (
        TextColumn("training"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    losses: list[Losses] = []
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(batches))
        for loss in train_both(staged, unstaged, batches):
            losses.append(loss)
            shown = f"{loss.staged:.4f} staged, {loss.unstaged:.4f} unstaged"
            progress.update(task, advance=1, description=shown)
    return losses, compare(losses, pipeline, staged, unstaged)


def draw_picture(
    pipeline: Pipeline, losses: Sequence[Losses], path: Path, console: Console
) -> None:
    """Draw stages and losses into `path`, or say how to install matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        console.print("No picture: pip install 'layerwise-jax[plot]' installs matplotlib.")
        return
    from layerwise_jax.examples.pictures import draw

    console.print(f"Picture of stages and losses: {draw(pipeline, losses, path)}")


def report(losses: Sequence[Losses], difference: Difference, console: Console) -> int:
    """Print the losses and the largest difference; returns the exit status."""
    first, last = losses[0], losses[-1]
    console.print(
        f"Staged loss: {first.staged:.4f} to {last.staged:.4f} nats per byte.\n"
        f"Unstaged loss: {first.unstaged:.4f} to {last.unstaged:.4f} nats per byte.\n"
        f"Largest relative difference: {difference.loss:.1e} in the losses, "
        f"{difference.params:.1e} in the trained parameters ({difference.worst})."
    )
    if difference.largest <= TOLERANCE:
        return OK
    console.print(f"The runs differ by more than {TOLERANCE:.0e}.", style="red")
    return DIFFERENT
