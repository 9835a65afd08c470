"""Do a stage's weights stay in the cache? Bytes that a tick reads from DRAM, by the GPU's own counters.

    python -m experiments.dense16.resident --layer_mib 32 --copies 1      # what is profiled: a few ticks of one layer

`Profiler` runs that under ncu, with clocks and caches left as they are, and counts only the ticks that stand between
the start and the stop of the profiler. XLA times kernels when it compiles, which ncu does not bear: that is
done before, without ncu, and its choices are kept.
"""

import argparse
import csv
import ctypes
import io
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import jax

from experiments.dense16.cases import LAYER_SIZES
from experiments.dense16.model import PRESETS, Dense
from experiments.dense16.stage import StageLoop

METRIC = "dram__bytes_read.sum"
TICKS = 16
UNITS = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
NCU_PLACES = ("/usr/local/cuda/bin", "/opt/nvidia/nsight-compute")


def main() -> None:
    parser = argparse.ArgumentParser(description="Run a few ticks of one layer between the profiler's start and stop.")
    parser.add_argument(
        "--layer_mib", type=int, nargs="+", choices=LAYER_SIZES, default=[32], help="MiB of the weights"
    )
    parser.add_argument("--copies", type=int, nargs="+", default=[1], help=f"sets that take turns, divisors of {TICKS}")
    parser.add_argument("--microbatch", type=int, default=8, help="sequences")
    asked = parser.parse_args()
    driver = ctypes.CDLL("libcuda.so.1")
    for layer_mib, copies in zip(asked.layer_mib, asked.copies, strict=True):
        model = profiled_model(layer_mib, asked.microbatch)
        loop = StageLoop(model, jax.local_devices()[0], groups=1, copies=copies, ticks=TICKS, rounds=1)
        weights, state = loop.weights(), loop.start()
        for _ in range(3):
            state = loop.program(weights, state._replace(positions=loop.positions()))
        state = jax.block_until_ready(state._replace(positions=loop.positions()))
        _check(driver.cuProfilerStart())
        state = jax.block_until_ready(loop.program(weights, state))
        _check(driver.cuProfilerStop())


def profiled_model(layer_mib: int, microbatch: int) -> Dense:
    """One layer of so many MiB of weights, a key of `LAYER_SIZES`."""
    heads, mlp = LAYER_SIZES[layer_mib]
    return replace(PRESETS["l2"], layers=1, heads=heads, mlp=mlp, batch=microbatch)


def _check(code: int) -> None:
    if code:
        raise RuntimeError(f"The profiler did not start or stop: CUDA error {code}.")


@dataclass(frozen=True)
class Profiler:
    """Counts the bytes that stages read from DRAM.

    Attributes:
      cases: (MiB of a layer's weights, sets of weights that take turns) of all stages.
      microbatch: sequences.
      seconds: after which a run is given up.
    """

    cases: Sequence[tuple[int, int]]
    microbatch: int
    seconds: float

    def dram_bytes(self, layer_mib: int, copies: int) -> tuple[float, dict[str, float]]:
        """Bytes read from DRAM in a tick of one of the stages, and by which kernels.

        Raises:
          FileNotFoundError: there is no ncu.
          RuntimeError: it failed or took too long; its words.
        """
        options = ["--clock-control", "none", "--cache-control", "none", "--metrics", METRIC, "--csv"]
        options += ["--profile-from-start", "off", "--target-processes", "all"]
        ran = self._run([ncu(), *options], [(layer_mib, copies)], self._choices.name)
        kernels = read_csv(ran.stdout)
        if ran.returncode or not kernels:
            raise RuntimeError(f"ncu ended with {ran.returncode}: {(ran.stdout + ran.stderr)[-2000:]}")
        by_kernel: dict[str, float] = {}
        for kernel, size in kernels:
            by_kernel[kernel] = by_kernel.get(kernel, 0) + size / TICKS
        return sum(by_kernel.values()), dict(sorted(by_kernel.items(), key=lambda item: -item[1])[:8])

    @cached_property
    def _choices(self) -> tempfile.TemporaryDirectory[str]:
        """The folder of the kernels that XLA has chosen for all stages; it goes with the profiler."""
        folder = tempfile.TemporaryDirectory(prefix="autotuned-")
        ran = self._run([], self.cases, folder.name)
        if ran.returncode:
            raise RuntimeError(f"The stages do not run: {(ran.stdout + ran.stderr)[-2000:]}")
        return folder

    def _run(
        self, before: Sequence[str], cases: Sequence[tuple[int, int]], choices: str
    ) -> subprocess.CompletedProcess[str]:
        own = [sys.executable, "-m", "experiments.dense16.resident", f"--microbatch={self.microbatch}"]
        own += ["--layer_mib", *(str(mib) for mib, _ in cases), "--copies", *(str(copies) for _, copies in cases)]
        # Without graphs every kernel is launched, and so counted, by itself.
        flags = f"--xla_gpu_per_fusion_autotune_cache_dir={choices} --xla_gpu_enable_command_buffer="
        flags = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
        # The process that asks may hold most of the memory.
        environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_FLAGS": flags}
        try:
            return subprocess.run(
                [*before, *own], capture_output=True, text=True, env=environment, timeout=self.seconds, check=False
            )
        except subprocess.TimeoutExpired as late:
            said = b"".join(part for part in (late.stdout, late.stderr) if isinstance(part, bytes))[-2000:]
            words = said.decode(errors="replace")
            raise RuntimeError(f"{before[:1] or own[:3]} did not end in {self.seconds:.0f} s: {words}") from late


def ncu() -> str:
    """The path of ncu."""
    found = shutil.which("ncu") or next(
        (str(path) for place in NCU_PLACES for path in sorted(Path(place).glob("**/ncu")) if os.access(path, os.X_OK)),
        None,
    )
    if found is None:
        raise FileNotFoundError("There is no ncu (Nsight Compute) on the PATH; install it, or leave the counters out.")
    return found


def read_csv(text: str) -> list[tuple[str, float]]:
    """(kernel, bytes) of every kernel in what ncu printed; lines before its table are passed over."""
    lines = text.splitlines()
    head = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    rows = csv.DictReader(io.StringIO("\n".join(lines[head:])))
    return [
        (row["Kernel Name"].split("(")[0], float(row["Metric Value"].replace(",", "")) * UNITS[row["Metric Unit"]])
        for row in rows
        if row.get("Metric Name") == METRIC
    ]


if __name__ == "__main__":
    main()
