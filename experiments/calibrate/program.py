"""Program of the calibration: reads working sets, finds the knee, writes the DeviceSpec."""

import datetime
import json
import re
import sys
from pathlib import Path

import jax

from experiments import command
from experiments.calibrate import options
from experiments.calibrate.curve import Calibration, calibrated, calibration_of
from experiments.calibrate.picture import draw_curve
from experiments.calibrate.reads import (
    MIB,
    PROGRAMS,
    Reading,
    persistent_reader,
    plain_reader,
    read_curve,
    round_counts,
)
from layerwise_jax.cost import DeviceSpec, device_named
from layerwise_jax.measure import detect_device

# A CPU's programs are rows of one loop, few enough that a round of theirs is smaller than the
# smallest working set.
CPU_PROGRAMS = 64


def main() -> None:
    output = command.output("calibrate")
    device = jax.local_devices()[0]
    is_cpu = device.platform == "cpu"
    if is_cpu and not options.ALLOW_CPU.value:
        print(
            "No GPU found, so there is nothing to calibrate. --allow_cpu measures the CPU.",
            file=sys.stderr,
        )
        sys.exit(2)
    try:
        spec = device_named(options.LIKE.value) if options.LIKE.value else detect_device()
    except ValueError as error:
        print(f"{error} Or name one like it: --like='NVIDIA H200'.", file=sys.stderr)
        sys.exit(2)
    programs = CPU_PROGRAMS if is_cpu else PROGRAMS * spec.multiprocessors
    reader = plain_reader(programs) if is_cpu else persistent_reader(programs)
    counts = round_counts(programs, options.SMALLEST.value * MIB, options.LARGEST.value * MIB)
    readings = read_curve(reader, programs, counts, options.READ.value * MIB)
    found = calibration_of(readings, spec.l2_bytes)
    today = datetime.datetime.now(tz=datetime.UTC).date()
    how = (
        f"measured on {device.device_kind}, {today}, JAX {jax.__version__} (python -m "
        "experiments.calibrate)"
    )
    report(spec, readings, found)
    write(calibrated(spec, found, how), spec, readings, found, output.folder)


def report(spec: DeviceSpec, readings: list[Reading], found: Calibration) -> None:
    """Print the curve, and the measured figures beside those of the table."""
    print(f"{'working set, MiB':>18} {'TB/s':>8}")
    for reading in readings:
        print(f"{reading.working_set / MIB:18.1f} {reading.bandwidth / 1e12:8.3f}")
    print(
        f"knee              {found.knee / MIB:8.1f} MiB (table: {spec.usable_l2_bytes / MIB:.1f})"
    )
    print(
        f"cache bandwidth   {found.l2_bandwidth / 1e12:8.3f} TB/s (table: "
        f"{spec.l2_bandwidth / 1e12:.3f})"
    )
    print(
        f"memory bandwidth  {found.memory_bandwidth / 1e12:8.3f} TB/s (table: "
        f"{spec.memory_bandwidth / 1e12:.3f})"
    )


def write(
    measured: DeviceSpec,
    spec: DeviceSpec,
    readings: list[Reading],
    found: Calibration,
    folder: Path,
) -> None:
    """Write the DeviceSpec, the curve and the picture, named by the device."""
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "_", measured.name.lower())
    (folder / f"{name}.json").write_text(measured.to_json() + "\n", encoding="utf-8")
    curve = [
        {"working_set_bytes": size, "bytes_a_second": bandwidth} for size, bandwidth in readings
    ]
    (folder / f"{name}_curve.json").write_text(json.dumps(curve, indent=1) + "\n", encoding="utf-8")
    draw_curve(spec, readings, found, folder / f"{name}.png")
    print(f"written to {folder}: {name}.json, {name}_curve.json, {name}.png")
