"""The paper's 16-layer dense network, decoded layer-wise and by its rivals: predicted, compiled,
emulated, measured.

    python -m experiments.dense16                              # any machine: verdict, predictions,
    compiles, emulation python -m experiments.dense16 --measure=all --name=h200x2  # on GPUs, as
    many as there are python -m experiments.dense16 --measure=scaling            # on GPUs: every
    shape, as deep and as long as fits python -m experiments.dense16 --report                     #
    tables and pictures again, from results/*.json

The flags' defaults are the paper's configuration. Needs the extras `aot` (to compile for absent
GPUs) and `plot`.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from absl import app, flags
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from experiments.command import refuse_words, use_emulated
from experiments.dense16.cases import PARTS as MEASURED_PARTS
from experiments.dense16.cases import toy_model
from experiments.dense16.errors import with_predictions
from experiments.dense16.measure import Settings, run
from experiments.dense16.measured import emulated_grid, strategies_grid
from experiments.dense16.model import PRESETS, Dense
from experiments.dense16.paper import DEVICES
from experiments.dense16.predictions import Setup, bounds_grid, predictions_grid, verdict_text
from experiments.dense16.report import COMPILED, PAGE, RESULTS, compiled_sizes, report
from experiments.dense16.runs import Run, circumstances, write_json
from experiments.dense16.scaling import Scaling, measure_scaling
from experiments.dense16.sixteen import compile_absent, emulate, shapes
from experiments.dense16.strategies import MAKERS
from experiments.dense16.transport import measure_rounds, measure_transport
from layerwise_jax.cost import H100, H200
from layerwise_jax.xla import can_compile_for_absent_gpus

PAPER = PRESETS["paper"]
PARTS = ("predict", "compile", "emulate")
ALL, SCALING, TRANSPORT, ROUNDS = "all", "scaling", "transport", "rounds"
# Room for all the steps of a program.
SMALL_CONTEXT = 256

DEVICE_COUNT = flags.DEFINE_integer(
    "devices", None, f"devices; {DEVICES} to plan for, all there are to measure"
)
LAYERS = flags.DEFINE_multi_integer(
    "layers", None, f"layers; {PAPER.layers} to plan for; for scaling n and 2n"
)
HEADS = flags.DEFINE_integer("heads", PAPER.heads, "heads of 128", lower_bound=1)
MLP = flags.DEFINE_integer("mlp", PAPER.mlp, "hidden width of the MLP", lower_bound=1)
DTYPE = flags.DEFINE_enum("dtype", PAPER.dtype, ["float16", "bfloat16"], "of weights and caches")
BATCH = flags.DEFINE_integer("batch", PAPER.batch, "sequences", lower_bound=1)
CONTEXT = flags.DEFINE_integer(
    "context", PAPER.context, "positions of a sequence; for scaling the most", lower_bound=1
)
ONLY = flags.DEFINE_multi_enum("parts", list(PARTS), PARTS, "what to do where nothing is measured")
MEASURE = flags.DEFINE_list(
    "measure",
    [],
    f"what to measure on GPUs: {ALL}, {SCALING}, {TRANSPORT}, {ROUNDS}, or of "
    f"{', '.join(MEASURED_PARTS['gpu'])}",
)
STRATEGIES = flags.DEFINE_multi_enum(
    "strategies", list(MAKERS), list(MAKERS), "what is measured in scaling"
)
SECONDS = flags.DEFINE_float(
    "seconds", 540, "no measurement is begun after so many seconds", lower_bound=1
)
REPEATS = flags.DEFINE_integer("repeats", 5, "of every time", lower_bound=1)
THREADS = flags.DEFINE_integer("threads", 8, "programs that are compiled at a time", lower_bound=1)
NAME = flags.DEFINE_string(
    "name", None, "of the file of results; made from the devices if not given"
)
REHEARSE = flags.DEFINE_bool(
    "rehearse", False, "measure toys on emulated devices, to try out what runs on GPUs"
)
ONLY_REPORT = flags.DEFINE_bool(
    "report", False, "do nothing but make tables and pictures from the results"
)
OUT = flags.DEFINE_string("out", str(RESULTS), "the folder of the results")
PAGE_PATH = flags.DEFINE_string("page", str(PAGE), "the page whose tables are filled in")


def main(argv: list[str]) -> None:
    refuse_words(argv)
    unknown = set(MEASURE.value) - {ALL, SCALING, TRANSPORT, ROUNDS, *MEASURED_PARTS["gpu"]}
    if unknown:
        raise app.UsageError(f"--measure knows nothing of {sorted(unknown)}")
    console, folder = (
        Console(width=None if sys.stdout.isatty() else 200, soft_wrap=False),
        Path(OUT.value),
    )
    if ONLY_REPORT.value:
        for name in report(folder, Path(PAGE_PATH.value)):
            console.print(f"Reported {folder / name}.json")
    elif MEASURE.value:
        measure(console, folder)
    else:
        plan(console, folder)


def plan(console: Console, folder: Path) -> None:
    """All that needs no accelerator."""
    setup = planned()
    use_emulated(console, setup.devices)
    if "compile" in ONLY.value:
        compile_programs(console, setup, folder)
    if "predict" in ONLY.value:
        console.print(verdict_text(setup, H100), highlight=False)
        bounds_grid(setup, (H100, H200)).show(console)
        compiled = (
            compiled_sizes(folder)
            if setup == Setup(PAPER, DEVICES) or "compile" in ONLY.value
            else {}
        )
        for device in (H100, H200):
            predictions_grid(setup, device, compiled.get(device.name, {})).show(console)
    if "emulate" in ONLY.value:
        run_emulated(console, setup.devices, folder)


def planned() -> Setup:
    """What the flags say, the paper's experiment where they say nothing."""
    layers = LAYERS.value[0] if LAYERS.value else PAPER.layers
    flagged = {"heads": HEADS.value, "mlp": MLP.value, "dtype": DTYPE.value}
    model = dataclasses.replace(
        PAPER, layers=layers, batch=BATCH.value, context=CONTEXT.value, **flagged
    )
    return Setup(model, DEVICE_COUNT.value or DEVICES)


def compile_programs(console: Console, setup: Setup, folder: Path) -> None:
    """Compile every strategy's program for absent H100s, and write down what a device holds."""
    if not can_compile_for_absent_gpus():
        console.print(
            "Nothing is compiled: XLA's compiler for GPUs is missing. pip install "
            "'layerwise-jax[aot]'"
        )
        return
    with progress(console, len(shapes(setup))) as done:
        found = compile_absent(setup, H100, done)
    write_json(folder / f"{COMPILED}.json", {**circumstances(), "devices": {H100.name: found}})


def run_emulated(console: Console, count: int, folder: Path) -> None:
    """All strategies at toy size on emulated devices; ends the program if their tokens differ."""
    with progress(console, 1 + len(MAKERS)) as done:
        records = emulate(toy_model(count), count, THREADS.value, done)
    write_json(folder / "emulated.json", {**circumstances(), "records": records})
    emulated_grid(records).show(console)
    if any(record["same_tokens"] < 1 for record in records):
        console.print("The strategies' tokens differ.", style="red")
        sys.exit(1)


def measure(console: Console, folder: Path) -> None:
    """What was asked for, on the GPUs that are there."""
    if REHEARSE.value:
        use_emulated(console, DEVICE_COUNT.value or DEVICES)
    about = circumstances()["machine"]
    if not about["gpus"] and not REHEARSE.value:
        console.print(
            "There is no GPU here to measure. --rehearse tries it out on emulated devices.",
            style="red",
        )
        sys.exit(2)
    count = DEVICE_COUNT.value or about["count"]
    kind = (
        about["gpus"][0].removeprefix("NVIDIA ").split()[0].lower() if about["gpus"] else "emulated"
    )
    asked = (
        list(MEASURED_PARTS["toy" if REHEARSE.value else "gpu"])
        if ALL in MEASURE.value
        else MEASURE.value
    )
    parts = tuple(part for part in asked if part not in (SCALING, TRANSPORT, ROUNDS))
    with progress(console) as done:
        for name, start in jobs(parts, count, done).items():
            path = folder / f"{NAME.value or f'{kind}x{count}'}{name}.json"
            document = start(path)
            write_json(path, with_predictions(document))
            show(console, document, path.stem)


def jobs(
    parts: Any, count: int, done: Callable[[str], None]
) -> Mapping[str, Callable[[Path], dict[str, Any]]]:
    """What is to be run, by the ending of its file's name: (path) to the document."""
    scale = "toy" if REHEARSE.value else "gpu"
    found: dict[str, Callable[[Path], dict[str, Any]]] = {}
    settings = Settings(scale, parts, SECONDS.value, REPEATS.value, count, THREADS.value)
    if parts:
        found[""] = lambda path: run(settings, path, done)
    if ROUNDS in MEASURE.value:
        found["_rounds"] = lambda path: measure_rounds(settings, path, done)
    if TRANSPORT in MEASURE.value:
        found["_transport"] = lambda path: measure_transport(settings, path, done)
    if SCALING in MEASURE.value:
        scaling = Scaling(
            scaling_models(scale),
            count,
            tuple(LAYERS.value or (count, 2 * count)),
            tuple(STRATEGIES.value),
            SECONDS.value,
            REPEATS.value,
            THREADS.value,
        )
        found["_scaling"] = lambda path: measure_scaling(scaling, path, done)
    return found


def scaling_models(scale: str) -> tuple[Dense, ...]:
    """What the flags say, and a model of the cache's size; toys to rehearse with."""
    if scale == "toy":
        count = DEVICE_COUNT.value or DEVICES
        return (
            dataclasses.replace(
                PRESETS["tiny"], heads=count, mlp=4 * count, batch=count, context=SMALL_CONTEXT
            ),
        )
    return (
        planned().model,
        dataclasses.replace(PRESETS["l2"], batch=BATCH.value, context=SMALL_CONTEXT),
    )


def show(console: Console, document: Mapping[str, Any], name: str) -> None:
    """The strategies side by side, and what failed."""
    known = {key: document[key] for key in ("machine", "versions", "date", "command", "records")}
    grid = strategies_grid([Run(name, **known)])
    if grid:
        grid.show(console)
    for failure in document.get("failures", []):
        console.print(
            f"failed: {failure['part']}, {failure['what']}: {failure['error']}",
            style="red",
            highlight=False,
        )


@contextmanager
def progress(console: Console, total: int | None = None) -> Iterator[Callable[[str], None]]:
    """A bar; what is yielded says what comes next, which is printed above the bar too."""
    columns = (SpinnerColumn(), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)

        def say(what: str) -> None:
            bar.console.print(
                f"[{bar.tasks[0].elapsed or 0:.0f} s] {what}", markup=False, highlight=False
            )
            bar.update(task, description=what.splitlines()[0][:80])
            if total:
                bar.advance(task)

        yield say


if __name__ == "__main__":
    app.run(main)
