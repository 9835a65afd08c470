"""Plan models for GPUs that are not there, from the buffer assignments of XLA's own compiler for
them.

    python -m experiments.plan_without_gpu

Needs no GPU; needs the extras `aot` and `plot`. Prints the plan of every model, draws its stages
against the cache, then plans a model of 175 billion parameters for 16, 64 and 1,024 devices. Exits
with 2 where the compiler is missing.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
from absl import app, flags

from experiments.command import refuse_words
from experiments.plan_without_gpu.picture import draw_plan
from experiments.plan_without_gpu.planning import plan, plan_large
from experiments.plan_without_gpu.subjects import SUBJECTS, count_parameters, large
from experiments.plan_without_gpu.table import large_table, plans_table
from layerwise_jax.cost import DEVICES, DeviceSpec, device_named
from layerwise_jax.partition import CapacityError
from layerwise_jax.xla import can_compile_for_absent_gpus

RESULTS = Path(__file__).parent / "results"
LARGE = "large"
DEVICE_COUNTS = (16, 64, 1024)
GPUS = [device.name for device in DEVICES if device.compute_capability]

DEVICE = flags.DEFINE_enum("device", "NVIDIA H100 80GB HBM3", GPUS, "the device to plan for")
MODELS = flags.DEFINE_multi_enum(
    "models", ["gpt", "resnet", "moe", LARGE], [*SUBJECTS, LARGE], "what to plan"
)
OUT = flags.DEFINE_string("out", str(RESULTS), "the folder to write to")


def main(argv: list[str]) -> None:
    refuse_words(argv)
    if not can_compile_for_absent_gpus():
        print(
            "XLA's compiler for GPUs is not installed: pip install 'layerwise-jax[aot]'.",
            file=sys.stderr,
        )
        sys.exit(2)
    jax.config.update("jax_platforms", "cpu")
    device, folder = device_named(DEVICE.value), Path(OUT.value)
    folder.mkdir(parents=True, exist_ok=True)
    planned = [
        figures
        for name in MODELS.value
        if name != LARGE and (figures := plan_one(name, device, folder))
    ]
    if planned:
        save(folder / "plans", planned, plans_table(planned))
    if LARGE in MODELS.value:
        figures = plan_large(large(), device, DEVICE_COUNTS)
        save(folder / LARGE, figures, large_table(figures))


def plan_one(name: str, device: DeviceSpec, folder: Path) -> dict[str, Any] | None:
    """Plan one model, print the plan and draw it; None, with the reason printed, if it does not
    fit.
    """
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


def save(path: Path, figures: Any, table: str) -> None:
    """Write figures as JSON, and their table, which is also printed."""
    path.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(table, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    app.run(main)
