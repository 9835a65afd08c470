"""What training by a schedule holds and how long it takes, on emulated devices, beside other ways
of training.

    python -m experiments.training                            # memory, step time, schedules; then
    the report python -m experiments.training --jaxpp_python=PATH        # with JaxPP: an
    interpreter that can import it python -m experiments.training --report                   #
    pictures and tables again, from results/*.json

Needs no accelerator; needs the extra `plot`.
"""

from pathlib import Path
from typing import Any

from absl import app, flags
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments.command import refuse_words, use_emulated
from experiments.training.closed_forms import compare_with_closed_forms
from experiments.training.memory import WAYS as MEMORY_WAYS
from experiments.training.memory import measure_memory
from experiments.training.memory import subjects as memory_subjects
from experiments.training.report import PAGE, RESULTS, report, write_results
from experiments.training.step_time import WAYS as TIME_WAYS
from experiments.training.step_time import measure_subject
from experiments.training.subjects import SUBJECTS

PARTS = ("memory", "step_time", "schedules")
UNSTAGED_PROGRAMS = 2

ONLY = flags.DEFINE_multi_enum("parts", list(PARTS), PARTS, "what to measure")
DEVICES = flags.DEFINE_integer("devices", 8, "emulated devices", lower_bound=2)
MEMORY_MICROBATCHES = flags.DEFINE_multi_integer(
    "memory_microbatches", [8, 16, 32, 64], "for the memory table"
)
MODELS = flags.DEFINE_multi_enum(
    "subjects", ["mlp", "gpt", "resnet"], list(SUBJECTS), "what is timed"
)
MICROBATCHES = flags.DEFINE_integer(
    "microbatches", 16, "microbatches of a timed step", lower_bound=1
)
REPETITIONS = flags.DEFINE_integer("repetitions", 7, "timed steps of every program", lower_bound=1)
JAXPP = flags.DEFINE_string("jaxpp_python", None, "an interpreter in which JaxPP can be imported")
SCHEDULE_STAGES = flags.DEFINE_integer(
    "schedule_stages", 4, "stages of the drawn schedules", lower_bound=2
)
SCHEDULE_MICROBATCHES = flags.DEFINE_integer(
    "schedule_microbatches", 8, "their microbatches", lower_bound=1
)
ONLY_REPORT = flags.DEFINE_bool(
    "report", False, "measure nothing: make pictures and tables from the results"
)
OUT = flags.DEFINE_string("out", str(RESULTS), "the folder of the results")
PAGE_PATH = flags.DEFINE_string("page", str(PAGE), "the page whose tables are filled in")


def main(argv: list[str]) -> None:
    refuse_words(argv)
    console, folder = Console(soft_wrap=True), Path(OUT.value)
    if not ONLY_REPORT.value:
        measure(console, folder)
    for name in report(folder, Path(PAGE_PATH.value)):
        console.print(f"Reported {folder / name}.json")


def measure(console: Console, folder: Path) -> None:
    """Measure what was asked for, and write it down."""
    use_emulated(console, DEVICES.value)
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(
            "", total=sum(steps() for part, steps in STEPS.items() if part in ONLY.value)
        )

        def done(what: str) -> None:
            progress.update(task, advance=1, description=what)

        if "memory" in ONLY.value:
            write_results(
                folder, "memory", measure_memory(DEVICES.value, MEMORY_MICROBATCHES.value, done)
            )
        if "step_time" in ONLY.value:
            write_results(folder, "step_time", measure_step_time(done))
        if "schedules" in ONLY.value:
            write_results(
                folder,
                "schedules",
                compare_with_closed_forms(SCHEDULE_STAGES.value, SCHEDULE_MICROBATCHES.value),
            )


def measure_step_time(done: Any) -> dict[str, Any]:
    """Every subject that was asked for."""
    return {
        "stages": DEVICES.value,
        "microbatches": MICROBATCHES.value,
        "repetitions": REPETITIONS.value,
        "subjects": {
            name: measure_subject(
                name, DEVICES.value, MICROBATCHES.value, REPETITIONS.value, JAXPP.value, done
            )
            for name in MODELS.value
        },
    }


def memory_steps() -> int:
    return len(memory_subjects(1)) * len(MEMORY_WAYS) * len(MEMORY_MICROBATCHES.value)


def time_steps() -> int:
    """A step for every program compiled, one for the rival, one for every round."""
    return len(MODELS.value) * (UNSTAGED_PROGRAMS + len(TIME_WAYS) + 1 + 1 + REPETITIONS.value)


# How often each part reports that something is done.
STEPS = {"memory": memory_steps, "step_time": time_steps, "schedules": lambda: 0}


if __name__ == "__main__":
    app.run(main)
