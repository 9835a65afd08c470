"""Train a GPT and a ResNet with batch norm for fifty steps, staged and unstaged, and hold the
losses side by side.

    python -m experiments.training.fifty_steps

The ResNet's microbatches are each normalised by themselves and update the running averages in their
order; its unstaged run does the same, microbatch by microbatch, and adds the gradients up. Exits
with 1 if a pair of runs ends further apart than 1e-4 of the loss.
"""

from __future__ import annotations

import sys
from typing import Any

from absl import app, flags
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments import command

TOLERANCE = 1e-4

STEPS = flags.DEFINE_integer("steps", 50, "steps of training", lower_bound=1)
flags.adopt_module_key_flags(command)


def main(argv: list[str]) -> None:
    command.refuse_arguments(argv)
    # Imported after the flags are parsed: --help does not start JAX.
    from experiments.training.problems import PROBLEMS, STAGES, train_both
    from experiments.training.report import report, write_results

    console, output = command.make_console(), command.output("training")
    command.use_emulated(console, STAGES)
    figures: dict[str, Any] = {"steps": STEPS.value, "tolerance": TOLERANCE, "subjects": {}}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        for name, make in PROBLEMS.items():
            task = progress.add_task(name, total=2 * STEPS.value)
            found = train_both(make(), STEPS.value, lambda task=task: progress.advance(task))
            figures["subjects"][name] = found
    write_results(output.folder, "fifty_steps", figures)
    report(output)
    sys.exit(0 if within_tolerance(figures, console) else 1)


def within_tolerance(figures: dict[str, Any], console: Console) -> bool:
    """Prints the losses; True if every pair of runs ends within the tolerance."""
    for name, run in figures["subjects"].items():
        console.print(
            f"{name}: {run['staged'][0]:.5f} to {run['staged'][-1]:.5f} staged, "
            f"{run['unstaged'][-1]:.5f} unstaged; "
            f"{run['apart_at_end']:.1e} apart, {run['most_apart']:.1e} at the most on the way."
        )
    # Written so that NaN, which compares as false, is a failure.
    return all(run["apart_at_end"] <= TOLERANCE for run in figures["subjects"].values())


if __name__ == "__main__":
    app.run(main)
