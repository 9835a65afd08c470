"""Sizes of programs compiled for an absent GPU against the same programs on the real one.

    python -m experiments.plan_without_gpu.against_device        # on a machine with a GPU
    python -m experiments.plan_without_gpu.against_device --write_absent=absent.json   # anywhere

Compiles every stage of `stages.py` for the local GPU as if it were absent (in a process that does
not see it, or read from --absent) and for the GPU itself, and runs it once there. Writes
against_device.json and a table of it. A failure is reported in its row; the others go on.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments import command
from experiments.plan_without_gpu.stages import StageProgram, stage_programs
from experiments.plan_without_gpu.table import comparison_table
from layerwise_jax.cost import DeviceSpec, device_named
from layerwise_jax.xla import compile_for

RESULTS = Path(__file__).parent / "results"
COMMITTED_ABSENT = RESULTS / "absent.json"
DEFAULT = "default"
# Compiler options that show why sizes differ: an absent device's kernels are chosen without timing
# them.
ABSENT_VARIANTS: Mapping[str, Mapping[str, Any]] = {
    DEFAULT: {},
    "library products": {"xla_gpu_enable_triton_gemm": False},
    "no split-K": {"xla_gpu_experimental_force_split_k": 1},
}
# Seconds that a compilation which has begun may take beyond the deadline.
GRACE = 20
SIZES = ("argument_bytes", "output_bytes", "constant_bytes", "temp_bytes", "peak_bytes")

flags.adopt_module_key_flags(command)
DEVICE = flags.DEFINE_string("device", None, "absent device (default: the local one, or an H200)")
ABSENT = flags.DEFINE_string("absent", None, "file with the absent half, from --write_absent")
WRITE_ABSENT = flags.DEFINE_string("write_absent", None, "write only the absent half, to this file")
SECONDS = flags.DEFINE_integer(
    "seconds", 210, "seconds after which no compilation is started", lower_bound=1
)


def main(argv: list[str]) -> None:
    command.refuse_arguments(argv)
    deadline = time.monotonic() + SECONDS.value
    if WRITE_ABSENT.value:
        jax.config.update("jax_platforms", "cpu")
        spec = device_named(DEVICE.value or "NVIDIA H200")
        write(Path(WRITE_ABSENT.value), absent_half(spec, deadline))
        return
    kind = jax.local_devices()[0].device_kind
    spec = device_named(DEVICE.value or kind)
    folder = command.output("plan_without_gpu").folder
    with tempfile.TemporaryDirectory() as scratch:
        waiting = None if ABSENT.value else start_absent(spec, Path(scratch) / "absent.json")
        real = real_half(
            kind, deadline, lambda half: write(folder / "against_device.json", {"real": half})
        )
        absent = (
            finish_absent(*waiting, deadline)
            if waiting
            else read(Path(ABSENT.value or COMMITTED_ABSENT))
        )
    figures = {"absent": absent, "real": real}
    write(folder / "against_device.json", figures)
    table = comparison_table(figures)
    (folder / "against_device.md").write_text(table.markdown() + "\n", encoding="utf-8")
    table.show(command.make_console())


def absent_half(spec: DeviceSpec, deadline: float) -> dict[str, Any]:
    """Sizes of every stage, compiled for an absent device."""
    programs: dict[str, dict[str, Any]] = {stage.name: {} for stage in stage_programs()}
    for variant, options in ABSENT_VARIANTS.items():
        for stage in stage_programs():
            programs[stage.name][variant] = guarded(compiled_sizes, deadline, spec, stage, options)
    return {"device": spec.name, "jax": jax.__version__, "programs": programs}


def real_half(kind: str, deadline: float, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Sizes of every stage, compiled for the local device and run once; saved after each stage."""
    programs: dict[str, dict[str, Any]] = {}
    half = {"device": kind, "jax": jax.__version__, "programs": programs}
    for stage in stage_programs():
        programs[stage.name] = {
            DEFAULT: guarded(compiled_sizes, deadline, None, stage, {}),
            "run": guarded(run_once, deadline, stage),
        }
        save(half)
    return half


def guarded(measure: Callable[..., dict[str, Any]], deadline: float, *args: Any) -> dict[str, Any]:
    """Result of `measure`, or the reason of its failure."""
    if time.monotonic() > deadline:
        return {"error": "no time was left"}
    try:
        return measure(*args)
    except Exception as error:  # one stage's failure, of whatever kind, must not cost the others
        return {
            "error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        }


def compiled_sizes(
    spec: DeviceSpec | None, stage: StageProgram, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Sizes from the buffer assignment, and the largest workspace buffers by name."""
    compiled = compile_for(spec, stage.fn, [stage.weights, stage.x], weights=[0], options=options)
    # Of several buffers that one instruction makes, the largest comes last and stays.
    largest = compiled.assignment.largest_temporaries() if compiled.assignment else ()
    return {
        "compiled_by": compiled.compiled_by,
        "weight_bytes": compiled.weight_bytes,
        **{size: getattr(compiled, size) for size in SIZES},
        "library_calls": list(compiled.library_calls),
        "from_buffer_assignment": compiled.assignment is not None,
        "largest_temporaries": {buffer.instruction: buffer.size for buffer in reversed(largest)},
        "compile_seconds": compiled.compile_seconds,
    }


def run_once(stage: StageProgram) -> dict[str, Any]:
    """Runs a stage; sizes that XLA reports of the program."""
    arrays = jax.tree.map(some_array, (stage.weights, stage.x))
    compiled = jax.jit(stage.fn, keep_unused=True).lower(*arrays).compile()
    outputs = jax.block_until_ready(compiled(*arrays))
    memory: Any = compiled.memory_analysis()
    return {
        "is_finite": all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(outputs)),
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "peak_bytes": getattr(memory, "peak_memory_in_bytes", None),
    }


def some_array(shape: jax.ShapeDtypeStruct) -> jax.Array:
    """Array of small positive numbers (some are variances) or of small indices."""
    draw = np.random.default_rng(0)
    if jnp.issubdtype(shape.dtype, jnp.integer):
        return jnp.asarray(draw.integers(0, 100, shape.shape), shape.dtype)
    return jnp.asarray(0.02 * draw.random(shape.shape, dtype=np.float32), shape.dtype)


def start_absent(spec: DeviceSpec, path: Path) -> tuple[subprocess.Popen[bytes], Path]:
    """Starts the absent half in a process that does not use the GPU."""
    module = "experiments.plan_without_gpu.against_device"
    command = [sys.executable, "-m", module, f"--write_absent={path}", f"--device={spec.name}"]
    command.append(f"--seconds={max(1, SECONDS.value - GRACE)}")
    return subprocess.Popen(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}), path


def finish_absent(process: subprocess.Popen[bytes], path: Path, deadline: float) -> dict[str, Any]:
    """Waits for the absent half; the committed one if the process fails or is late."""
    try:
        process.wait(timeout=max(1.0, deadline + GRACE - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
    if path.exists():
        return read(path)
    note = (
        f"the process for the absent half ended with {process.poll()}; this is "
        f"{COMMITTED_ABSENT.name}"
    )
    return {**read(COMMITTED_ABSENT), "note": note}


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, figures: dict[str, Any]) -> None:
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
