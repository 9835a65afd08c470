"""Program of the plans for absent GPUs: plans, draws and tabulates the selected models."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax

from experiments import command
from experiments.grid import Grid
from experiments.plan_without_gpu import options
from experiments.plan_without_gpu.names import LARGE
from experiments.plan_without_gpu.picture import draw_plan
from experiments.plan_without_gpu.planning import plan, plan_large
from experiments.plan_without_gpu.subjects import SUBJECTS, count_parameters, large
from experiments.plan_without_gpu.table import large_table, plans_table
from layerwise_jax.cost import DeviceSpec, device_named
from layerwise_jax.partition import CapacityError
from layerwise_jax.xla import can_compile_for_absent_gpus

DEVICE_COUNTS = (16, 64, 1024)


def main() -> None:
    if not can_compile_for_absent_gpus():
        print(
            "XLA's compiler for GPUs is not installed: pip install 'layerwise-jax[aot]'.",
            file=sys.stderr,
        )
        sys.exit(2)
    jax.config.update("jax_platforms", "cpu")
    device = device_named(options.DEVICE.value)
    folder = command.output("plan_without_gpu").folder
    planned = [
        figures
        for name in options.MODELS.value
        if name != LARGE and (figures := plan_one(name, device, folder))
    ]
    if planned:
        save(folder / "plans", planned, plans_table(planned))
    if LARGE in options.MODELS.value:
        figures = plan_large(large(), device, DEVICE_COUNTS)
        save(folder / LARGE, figures, large_table(figures))


def plan_one(name: str, device: DeviceSpec, folder: Path) -> dict[str, Any] | None:
    """Plans, prints and draws one model; None, after printing the reason, if it does not fit."""
    subject, started = SUBJECTS[name](), time.perf_counter()
    print(
        f"{subject.title}: {count_parameters(subject.params):,} parameters, {subject.num_devices} "
        "devices"
    )
    try:
        found = plan(subject, device)
    except CapacityError as error:
        print(f"does not fit: {error}")
        return None
    seconds = time.perf_counter() - started
    print(found)
    draw_plan(found, device, subject.title, folder / f"{name}.png")
    return {
        "title": subject.title,
        "parameters": count_parameters(subject.params),
        "examples": subject.batch.shape[0],
        "usable_cache_bytes": device.usable_l2_bytes,
        "seconds": seconds,
        "plan": json.loads(found.to_json()),
    }


def save(path: Path, figures: Any, table: Grid) -> None:
    """Write figures as JSON and their table as Markdown, and print the table."""
    path.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(table.markdown() + "\n", encoding="utf-8")
    table.show(command.make_console())
