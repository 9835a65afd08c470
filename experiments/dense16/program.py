"""Program of the 16-layer experiment: plans, measures or reports, as the flags select."""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from experiments import command
from experiments.command import Output
from experiments.dense16 import options
from experiments.dense16.cases import PARTS as MEASURED_PARTS
from experiments.dense16.cases import toy_model
from experiments.dense16.errors import with_predictions
from experiments.dense16.measure import Settings, run
from experiments.dense16.measured import emulated_grid, strategies_grid
from experiments.dense16.model import PRESETS, Dense
from experiments.dense16.names import ALL, JOBS, ROUNDS, SCALING, SELF, TRANSPORT, VARIANTS
from experiments.dense16.paper import DEVICES
from experiments.dense16.predictions import Setup, bounds_grid, predictions_grid, verdict_text
from experiments.dense16.report import COMPILED, compiled_sizes, report
from experiments.dense16.runs import Run, circumstances, write_json
from experiments.dense16.scaling import Scaling, measure_scaling
from experiments.dense16.self_message import measure_self_message
from experiments.dense16.sixteen import compile_absent, emulate, shapes
from experiments.dense16.strategies import MAKERS
from experiments.dense16.transport import measure_rounds, measure_transport
from experiments.dense16.variants import measure_variants
from layerwise_jax.cost import H100, H200
from layerwise_jax.xla import can_compile_for_absent_gpus

PAPER = PRESETS["paper"]
# Room for all the steps of a program.
SMALL_CONTEXT = 256


def main() -> None:
    console, output = command.make_console(), command.output("dense16")
    if options.ONLY_REPORT.value:
        for name in report(output):
            console.print(f"Reported {name}", soft_wrap=True)
        console.print(f"Page: {output.page}", soft_wrap=True)
    elif options.MEASURE.value:
        measure(console, output.folder)
    else:
        plan(console, output)


def plan(console: Console, output: Output) -> None:
    """Run the parts that need no accelerator."""
    setup = planned()
    command.use_emulated(console, setup.devices)
    if "compile" in options.ONLY.value:
        compile_programs(console, setup, output.folder)
    if "predict" in options.ONLY.value:
        console.print(verdict_text(setup, H100), highlight=False)
        bounds_grid(setup, (H100, H200)).show(console)
        compiled = (
            compiled_sizes(output.results())
            if setup == Setup(PAPER, DEVICES) or "compile" in options.ONLY.value
            else {}
        )
        for device in (H100, H200):
            predictions_grid(setup, device, compiled.get(device.name, {})).show(console)
    if "emulate" in options.ONLY.value:
        run_emulated(console, setup.devices, output.folder)


def planned() -> Setup:
    """Setup of the flags; the defaults are the paper's."""
    layers = options.LAYERS.value[0] if options.LAYERS.value else PAPER.layers
    flagged = {"heads": options.HEADS.value, "mlp": options.MLP.value, "dtype": options.DTYPE.value}
    model = dataclasses.replace(
        PAPER, layers=layers, batch=options.BATCH.value, context=options.CONTEXT.value, **flagged
    )
    return Setup(model, options.DEVICE_COUNT.value or DEVICES)


def compile_programs(console: Console, setup: Setup, folder: Path) -> None:
    """Compiles every strategy for absent H100s and writes the bytes per device."""
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
    """Runs all strategies at toy size on emulated devices; exits with 1 if their tokens differ."""
    with progress(console, 1 + len(MAKERS)) as done:
        records = emulate(toy_model(count), count, options.THREADS.value, done)
    write_json(folder / "emulated.json", {**circumstances(), "records": records})
    emulated_grid(records).show(console)
    if any(record["same_tokens"] < 1 for record in records):
        console.print("The strategies' tokens differ.", style="red")
        sys.exit(1)


def measure(console: Console, folder: Path) -> None:
    """Measures the selected parts on the local GPUs."""
    if options.REHEARSE.value:
        command.use_emulated(console, options.DEVICE_COUNT.value or DEVICES)
    about = circumstances()["machine"]
    if not about["gpus"] and not options.REHEARSE.value:
        console.print(
            "No GPU found to measure. --rehearse runs toys on emulated devices.",
            style="red",
        )
        sys.exit(2)
    count = options.DEVICE_COUNT.value or about["count"]
    kind = (
        about["gpus"][0].removeprefix("NVIDIA ").split()[0].lower() if about["gpus"] else "emulated"
    )
    asked = (
        list(MEASURED_PARTS["toy" if options.REHEARSE.value else "gpu"])
        if ALL in options.MEASURE.value
        else options.MEASURE.value
    )
    parts = tuple(part for part in asked if part not in JOBS)
    with progress(console) as done:
        for name, start in jobs(parts, count, done).items():
            path = folder / f"{options.NAME.value or f'{kind}x{count}'}{name}.json"
            document = start(path)
            write_json(path, with_predictions(document))
            show(console, document, path.stem)


def jobs(
    parts: Any, count: int, done: Callable[[str], None]
) -> Mapping[str, Callable[[Path], dict[str, Any]]]:
    """Selected measurements: suffix of the file to a function from its path to the document."""
    scale = "toy" if options.REHEARSE.value else "gpu"
    found: dict[str, Callable[[Path], dict[str, Any]]] = {}
    limits = (options.SECONDS.value, options.REPEATS.value)
    settings = Settings(scale, parts, *limits, count, options.THREADS.value)
    if parts:
        found[""] = lambda path: run(settings, path, done)
    if ROUNDS in options.MEASURE.value:
        found["_rounds"] = lambda path: measure_rounds(settings, path, done)
    if VARIANTS in options.MEASURE.value:
        found["_variants"] = lambda path: measure_variants(settings, path, done)
    if SELF in options.MEASURE.value:
        found["_self"] = lambda path: measure_self_message(settings, path, done)
    if TRANSPORT in options.MEASURE.value:
        found["_transport"] = lambda path: measure_transport(settings, path, done)
    if SCALING in options.MEASURE.value:
        scaling = Scaling(
            scaling_models(scale),
            count,
            tuple(options.LAYERS.value or (count, 2 * count)),
            tuple(options.STRATEGIES.value),
            options.SECONDS.value,
            options.REPEATS.value,
            options.THREADS.value,
        )
        found["_scaling"] = lambda path: measure_scaling(scaling, path, done)
    return found


def scaling_models(scale: str) -> tuple[Dense, ...]:
    """The model of the flags and one of the size of a cache; toys to rehearse."""
    if scale == "toy":
        count = options.DEVICE_COUNT.value or DEVICES
        return (
            dataclasses.replace(
                PRESETS["tiny"], heads=count, mlp=4 * count, batch=count, context=SMALL_CONTEXT
            ),
        )
    return (
        planned().model,
        dataclasses.replace(PRESETS["l2"], batch=options.BATCH.value, context=SMALL_CONTEXT),
    )


def show(console: Console, document: Mapping[str, Any], name: str) -> None:
    """Prints the strategies side by side, and the failures."""
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
    """Progress bar; yields a function that announces the next piece of work."""
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
