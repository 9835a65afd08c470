"""Results of the training experiment as files, and the page made from them."""

import datetime
import json
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from experiments.command import Output
from experiments.page import update_page
from experiments.training.closed_forms import simulate
from experiments.training.gpu_report import draw, markdown
from experiments.training.pictures import draw_losses, draw_memory, draw_schedules, draw_step_time
from experiments.training.tables import (
    losses_table,
    memory_table,
    rivals_table,
    schedules_table,
    step_time_table,
)

TABLES: dict[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
    "memory": ("memory", memory_table),
    "step time": ("step_time", step_time_table),
    "rivals": ("step_time", rivals_table),
    "schedules": ("schedules", schedules_table),
    "losses": ("fifty_steps", losses_table),
    "gpu": ("gpu", markdown),
}


def write_results(folder: Path, name: str, figures: Mapping[str, Any]) -> None:
    """Write figures as JSON with machine, versions and date."""
    folder.mkdir(parents=True, exist_ok=True)
    stamped = {
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}, {platform.system()})",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        **figures,
    }
    (folder / f"{name}.json").write_text(json.dumps(stamped, indent=1) + "\n", encoding="utf-8")


def report(output: Output) -> list[str]:
    """Draw the pictures and fill the tables of the page from the results.

    Returns:
      Names of the results that were found; the page keeps its text about others.
    """
    found = output.results()
    known = {
        name: json.loads(found[name].read_text(encoding="utf-8"))
        for name, _ in TABLES.values()
        if name in found
    }
    for name, figures in known.items():
        _draw(name, figures, output.folder / f"{name}.png")
    update_page(
        output.page,
        {mark: table(known[name]) for mark, (name, table) in TABLES.items() if name in known},
    )
    return list(known)


def _draw(name: str, figures: Mapping[str, Any], path: Path) -> None:
    match name:
        case "memory":
            draw_memory(figures, path)
        case "step_time":
            draw_step_time(figures, path)
        case "schedules":
            draw_schedules(simulate(figures["stages"], figures["microbatches"]), path)
        case "fifty_steps":
            draw_losses(figures, path)
        case "gpu":
            draw(figures, path)
