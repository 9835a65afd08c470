"""Program of the training experiment: measures the selected parts, then reports."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments import command
from experiments.training import options
from experiments.training.closed_forms import compare_with_closed_forms
from experiments.training.memory import WAYS as MEMORY_WAYS
from experiments.training.memory import measure_memory
from experiments.training.memory import subjects as memory_subjects
from experiments.training.report import report, write_results
from experiments.training.step_time import WAYS as TIME_WAYS
from experiments.training.step_time import measure_subject

UNSTAGED_PROGRAMS = 2


def main() -> None:
    console, output = command.make_console(), command.output("training")
    if not options.ONLY_REPORT.value:
        measure(console, output.folder)
    for name in report(output):
        console.print(f"Reported {name}", soft_wrap=True)
    console.print(f"Page: {output.page}", soft_wrap=True)


def measure(console: Console, folder: Path) -> None:
    """Measures the selected parts and writes the results."""
    command.use_emulated(console, options.DEVICES.value)
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(
            "", total=sum(steps() for part, steps in STEPS.items() if part in options.ONLY.value)
        )

        def done(what: str) -> None:
            progress.update(task, advance=1, description=what)

        if "memory" in options.ONLY.value:
            write_results(
                folder,
                "memory",
                measure_memory(options.DEVICES.value, options.MEMORY_MICROBATCHES.value, done),
            )
        if "step_time" in options.ONLY.value:
            write_results(folder, "step_time", measure_step_time(done))
        if "schedules" in options.ONLY.value:
            write_results(
                folder,
                "schedules",
                compare_with_closed_forms(
                    options.SCHEDULE_STAGES.value, options.SCHEDULE_MICROBATCHES.value
                ),
            )


def measure_step_time(done: Any) -> dict[str, Any]:
    """Step times of every selected subject."""
    devices, microbatches = options.DEVICES.value, options.MICROBATCHES.value
    repetitions, jaxpp = options.REPETITIONS.value, options.JAXPP.value
    return {
        "stages": devices,
        "microbatches": microbatches,
        "repetitions": repetitions,
        "subjects": {
            name: measure_subject(name, devices, microbatches, repetitions, jaxpp, done)
            for name in options.MODELS.value
        },
    }


def memory_steps() -> int:
    return len(memory_subjects(1)) * len(MEMORY_WAYS) * len(options.MEMORY_MICROBATCHES.value)


def time_steps() -> int:
    """Progress steps: one per compiled program, one for the rival, one per round."""
    return len(options.MODELS.value) * (
        UNSTAGED_PROGRAMS + len(TIME_WAYS) + 1 + 1 + options.REPETITIONS.value
    )


# How often each part reports that something is done.
STEPS = {"memory": memory_steps, "step_time": time_steps, "schedules": lambda: 0}
