"""Train a small transformer layer-wise on emulated devices, beside the same training unstaged.

    python -m experiments.quickstart

Prints the plan, both losses as they fall, and the largest difference between the two runs; draws
plan and losses. Exits with 1 if the runs come further apart than rounding explains, with 2 if what
was asked for cannot be run.
"""

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from absl import app, flags
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import layerwise_jax as lw
from experiments.command import refuse_words
from experiments.models.gpt import GPT, next_token_loss
from experiments.quickstart.picture import draw
from experiments.quickstart.prose import draw_batches, read_prose
from experiments.quickstart.training import Difference, Losses, Run, compare, train_both
from layerwise_jax._jax import emulate_devices
from layerwise_jax.pipeline import Pipeline

ROOT = Path(__file__).parents[2]
MIB = 2**20
DEPTH = 12
MODEL = GPT(vocabulary=256, width=96, depth=DEPTH, heads=4, context=64)
LEARNING_RATE = 3e-3
# Adam divides by the gradient's size. Below this lies rounding, which it would otherwise blow up to
# whole steps.
EPSILON = 1e-5
# What float32 rounding adds up to over a few hundred steps is below this by an order of magnitude.
TOLERANCE = 1e-4
PICTURES = (".png", ".svg", ".pdf")

STEPS = flags.DEFINE_integer("steps", 40, "steps of training", lower_bound=1)
STAGES = flags.DEFINE_integer(
    "stages", 8, "stages, a device each", lower_bound=1, upper_bound=DEPTH
)
BATCH = flags.DEFINE_integer("batch", 16, "sequences in a batch", lower_bound=1)
MICROBATCHES = flags.DEFINE_integer(
    "microbatches", 16, "microbatches that a batch is split into", lower_bound=1
)
CAPACITY = flags.DEFINE_float(
    "capacity_mib", 1.5, "MiB that a stage may hold; 0 for no capacity", lower_bound=0
)
DEVICES = flags.DEFINE_enum(
    "devices", "emulated", ["emulated", "local"], "CPU devices made for it, or those there are"
)
PICTURE = flags.DEFINE_string(
    "picture", str(ROOT / "build" / "quickstart.png"), "where to draw plan and losses"
)


@flags.multi_flags_validator(
    ["batch", "microbatches"],
    "--batch must be a multiple of --microbatches: each microbatch has as many sequences",
)
def _batch_splits(asked: dict[str, Any]) -> bool:
    return asked["batch"] % asked["microbatches"] == 0


@flags.validator("picture", f"the suffix must be one of {', '.join(PICTURES)}")
def _is_picture(path: str) -> bool:
    return Path(path).suffix in PICTURES


def main(argv: list[str]) -> None:
    """The steps of the demonstration, in their order."""
    refuse_words(argv)
    console = Console(soft_wrap=True)
    try:
        if DEVICES.value == "emulated":
            emulate_devices(STAGES.value)
        text = read_prose(ROOT)
        batches = draw_batches(text, STEPS.value, BATCH.value, MODEL.context + 1)
        params = jax.jit(MODEL.init)(jax.random.key(0), batches[0, :, :-1])
        console.print(
            f"{len(text):,} bytes of prose; {count(params):,} parameters; {STAGES.value} stages"
        )
        pipeline = stage(params, batches[0])
    except ValueError as error:
        console.print(f"Cannot run: {error}", style="red")
        sys.exit(2)
    print(pipeline.plan)
    losses, difference = train(pipeline, params, batches, console)
    path = draw(pipeline.plan, losses, Path(PICTURE.value))
    console.print(f"Drew the plan and the losses: {path}")
    sys.exit(0 if report(losses, difference, console) else 1)


def count(params: Any) -> int:
    """How many parameters there are."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def stage(params: Any, batch: NDArray[np.int32]) -> Pipeline:
    """The training loss as a pipeline."""
    return lw.layerwise(
        next_token_loss(MODEL),
        params,
        batch,
        num_stages=STAGES.value,
        num_microbatches=MICROBATCHES.value,
        capacity=round(CAPACITY.value * MIB) or None,
        reduce="mean",
    )


def train(
    pipeline: Pipeline, params: Any, batches: NDArray[np.int32], console: Console
) -> tuple[list[Losses], Difference]:
    """Both runs from the same parameters over the same batches, with their losses shown as they
    fall.
    """
    optimiser = optax.adamw(LEARNING_RATE, eps=EPSILON)
    with console.status("compiling the staged step"):
        staged = Run(pipeline.value_and_grad, pipeline.place(params), batches[0], optimiser)
    with console.status("compiling the unstaged step"):
        unstaged = Run(jax.value_and_grad(next_token_loss(MODEL)), params, batches[0], optimiser)
    columns = (
        "training",
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    losses: list[Losses] = []
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(batches))
        for loss in train_both(staged, unstaged, batches):
            losses.append(loss)
            progress.update(
                task,
                advance=1,
                description=f"loss {loss.staged:.4f} staged, {loss.unstaged:.4f} unstaged",
            )
    return losses, compare(losses, pipeline, staged, unstaged)


def report(losses: list[Losses], difference: Difference, console: Console) -> bool:
    """Say how far the runs are apart, and whether that is within rounding."""
    first, last = losses[0], losses[-1]
    console.print(
        f"The staged loss fell from {first.staged:.4f} to {last.staged:.4f}, "
        f"the unstaged one from {first.unstaged:.4f} to {last.unstaged:.4f} nats a byte."
    )
    console.print(
        f"Largest relative difference: {difference.loss:.1e} in the losses, "
        f"{difference.params:.1e} in the parameters after training ({difference.worst})."
    )
    if difference.largest <= TOLERANCE:
        return True
    console.print(
        f"That is more than {TOLERANCE:.0e}: the staged run is not the unstaged one.", style="red"
    )
    return False


if __name__ == "__main__":
    app.run(main)
