"""Page and pictures of the 16-layer experiment, made from its results."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from experiments.command import Output
from experiments.dense16.advice import advice_grid
from experiments.dense16.errors import errors_grid, predicted_records
from experiments.dense16.measured import (
    all_records_grid,
    emulated_grid,
    overhead_grid,
    records_of,
    residency_grid,
    stage_grid,
    strategies_grid,
)
from experiments.dense16.measured_pictures import draw_errors, draw_measured, draw_ratios
from experiments.dense16.model import PRESETS
from experiments.dense16.paper import DEVICES
from experiments.dense16.pictures import draw_memory, draw_paper, draw_ring
from experiments.dense16.predictions import Setup, bounds_grid, predictions_grid, verdict_text
from experiments.dense16.runs import Run, load_runs
from experiments.dense16.targets import targets_grid
from experiments.grid import Grid
from experiments.page import update_page
from layerwise_jax.cost import H100, H200

COMPILED = "compiled"
NOT_MEASURED = "Not measured yet."

PICTURES: dict[str, Callable[[Sequence[Run], Path], bool]] = {
    "measured": draw_measured,
    "errors": draw_errors,
    "ratios": draw_ratios,
}


def report(output: Output, setup: Setup | None = None) -> list[str]:
    """Fill the tables of the page, draw the pictures and list every record, from the results.

    Returns:
      Names of the runs that were found.
    """
    setup = setup or Setup(PRESETS["paper"], DEVICES)
    folder, results = output.folder, output.results()
    runs = load_runs(results)
    # A run that was cut short has no predictions in its file.
    measured = [
        dataclasses.replace(run, records=predicted_records(run))
        for run in runs
        if not run.is_emulated
    ]
    draw_paper(setup, (H100, H200), folder / "paper.png")
    draw_ring(folder / "ring.png")
    draw_memory(setup, (H100, H200), folder / "memory.png")
    drawn = [name for name, draw in PICTURES.items() if draw(measured, folder / f"{name}.png")]
    listed = "\n\n".join(all_records_grid(run).markdown() for run in measured)
    (folder / "records.md").write_text(listed + "\n", encoding="utf-8")
    parts = {
        "verdict": verdict_text(setup, H100),
        "bounds": bounds_grid(setup, (H100, H200)).markdown(),
        "predictions": _predictions(setup, results),
        "strategies": _measured_strategies(measured, drawn),
        "targets": _text(targets_grid(measured)),
        "stage": _text(stage_grid(measured)),
        "residency": _text(residency_grid(measured)),
        "overhead": _text(overhead_grid(measured)),
        "errors": _text(errors_grid(measured))
        + _picture(drawn, "errors", "Predicted against measured tokens/s"),
        "emulated": _text(
            emulated_grid(tokens) if (tokens := records_of(runs, "tokens")) else None
        ),
        "advice": advice_grid().markdown(),
        "runs": "\n".join([*(f"- {run}." for run in runs), *_compiled_by(results)]),
    }
    update_page(output.page, parts)
    return [run.name for run in runs]


def compiled_sizes(results: Mapping[str, Path]) -> dict[str, dict[str, dict[str, int]]]:
    """Bytes of the programs compiled for absent devices, by device, then by strategy and shape."""
    path = results.get(COMPILED)
    return json.loads(path.read_text(encoding="utf-8"))["devices"] if path else {}


def _compiled_by(results: Mapping[str, Path]) -> list[str]:
    """The command and versions that compiled the programs for absent devices."""
    path = results.get(COMPILED)
    if path is None:
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    return [
        (
            f"- `results/{path.name}`: jax {found['versions']['jax']}; {found['date']}; "
            f"`{found['command']}`."
        )
    ]


def _predictions(setup: Setup, results: Mapping[str, Path]) -> str:
    compiled = compiled_sizes(results)
    grids = [
        predictions_grid(setup, device, compiled.get(device.name, {})) for device in (H100, H200)
    ]
    return "\n\n".join(grid.markdown() for grid in grids)


def _measured_strategies(runs: Sequence[Run], drawn: Sequence[str]) -> str:
    text = _text(strategies_grid(runs))
    text += _picture(drawn, "measured", "Measured, predicted, and the bounds")
    return text + _picture(
        drawn, "ratios", "Layer-wise over tensor x pipeline, against the paper's ratio"
    )


def _text(grid: Grid | None) -> str:
    return grid.markdown() if grid else NOT_MEASURED


def _picture(drawn: Sequence[str], name: str, text: str) -> str:
    return f"\n\n![{text}](results/{name}.png)" if name in drawn else ""
