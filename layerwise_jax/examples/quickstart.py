"""Train a small transformer in stages on emulated devices, beside the same training unstaged.

    python -m layerwise_jax.examples.quickstart

Prints the plan, both losses as they fall, and the largest difference between the two runs; draws
stages and losses if matplotlib is installed. Exits with 1 if the runs differ by more than rounding
explains, with 2 if the request cannot be run.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import app, flags

PICTURES = (".png", ".svg", ".pdf")

STEPS = flags.DEFINE_integer("steps", 40, "training steps", lower_bound=1)
DEPTH = flags.DEFINE_integer("depth", 12, "blocks of the transformer", lower_bound=1)
STAGES = flags.DEFINE_integer("stages", 6, "stages, one device each", lower_bound=1)
BATCH = flags.DEFINE_integer("batch", 16, "sequences in a batch", lower_bound=1)
MICROBATCHES = flags.DEFINE_integer("microbatches", 16, "microbatches in a batch", lower_bound=1)
CAPACITY = flags.DEFINE_float(
    "capacity_mib", 1.5, "capacity of a stage in MiB; 0 means no capacity", lower_bound=0
)
DEVICES = flags.DEFINE_enum(
    "devices", "emulated", ["emulated", "local"], "emulated CPU devices, or the local devices"
)
PICTURE = flags.DEFINE_string(
    "picture", "build/quickstart.png", "file for the picture of stages and losses"
)


@flags.multi_flags_validator(
    ["batch", "microbatches"], "--batch must be a multiple of --microbatches"
)
def _batch_splits(values: Mapping[str, Any]) -> bool:
    return values["batch"] % values["microbatches"] == 0


@flags.multi_flags_validator(["depth", "stages"], "--stages must be at most --depth")
def _stages_have_blocks(values: Mapping[str, Any]) -> bool:
    return values["stages"] <= values["depth"]


@flags.validator("picture", f"the suffix must be one of {', '.join(PICTURES)}")
def _is_picture(path: str) -> bool:
    return Path(path).suffix in PICTURES


def main(argv: list[str]) -> None:
    """Run the demonstration that the flags describe, and exit with its status."""
    if len(argv) > 1:
        raise app.UsageError(f"arguments must be flags (--name=value), got {argv[1:]}")
    # Imported after the flags are parsed: --help starts neither JAX nor work.
    from layerwise_jax.examples.demonstration import Demonstration, run

    demonstration = Demonstration(
        depth=DEPTH.value,
        steps=STEPS.value,
        stages=STAGES.value,
        batch=BATCH.value,
        microbatches=MICROBATCHES.value,
        capacity_mib=CAPACITY.value,
        emulated=DEVICES.value == "emulated",
        picture=Path(PICTURE.value),
    )
    sys.exit(run(demonstration))


if __name__ == "__main__":
    app.run(main)
