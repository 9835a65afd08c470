"""Measurement session: runs part by part and writes the document after every record.

What fails, or what time is too short for, stands in the file with its reason; the rest goes on.
"""

import gc
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from experiments.dense16.cases import PARTS, Part, Scale
from experiments.dense16.jobs import Job, jobs_of
from experiments.dense16.runs import circumstances, write_json
from experiments.dense16.timing import Program, Timing, compile_all, time_in_turns

# The programs of so many are in memory together.
JOBS_AT_A_TIME = 4


@dataclass(frozen=True)
class Settings:
    """Options of a measurement session.

    Attributes:
      scale: the sizes: for GPUs, or toys for emulated devices.
      parts: in this order; None for all of the scale.
      seconds: wall-clock time to keep to: no case is begun after it.
      repeats: of every time.
      devices: how many to use; None for all there are.
      threads: programs that are compiled at a time.
    """

    scale: Scale
    parts: tuple[Part, ...] | None = None
    seconds: float = 540.0
    repeats: int = 5
    devices: int | None = None
    threads: int = 8


def run(
    settings: Settings, out_path: Path, progress: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Measure, and write the document to `out_path` after every case; returns it."""
    session = Session(settings, out_path, progress)
    for part in settings.parts or PARTS[settings.scale]:
        session.measure(part)
    return session.document


class Session:
    """Measurement session with its growing document."""

    def __init__(self, settings: Settings, out_path: Path, progress: Callable[[str], None]):
        self.settings, self.out_path, self.progress = settings, out_path, progress
        self.devices = jax.local_devices()[: settings.devices]
        self.started = time.perf_counter()
        self.document: dict[str, Any] = {**circumstances(), "records": [], "failures": []}
        self.document["machine"]["count"] = len(self.devices)

    def measure(self, part: Part) -> None:
        """Measure one part; programs of several jobs are compiled at a time, then timed."""
        self.measure_jobs(part, jobs_of(part, self.settings.scale, self.devices))

    def measure_jobs(self, part: str, jobs: list[Job]) -> None:
        """Compile and time these jobs."""
        for first in range(0, len(jobs), JOBS_AT_A_TIME):
            if self.is_late():
                self.fail(
                    part, f"{len(jobs) - first} jobs", TimeoutError("not begun: the time was up")
                )
                return
            self._measure(part, jobs[first : first + JOBS_AT_A_TIME])

    def _measure(self, part: str, jobs: list[Job]) -> None:
        programs = self._compile(part, jobs)
        for i, job in enumerate(jobs):
            if self.is_late():
                self.fail(part, job.what, TimeoutError("not begun: the time was up"))
                continue
            self.progress(f"{part}: {job.what}")
            try:
                compiled = {name: programs[i, name] for name in job.runs if (i, name) in programs}
                for record in job.records(compiled, self._timed(part, job, compiled)):
                    self.add(record)
            except Exception as error:
                self.fail(part, job.what, error)
            self.write()
            # what failed may be held by its own traceback, and the next case needs the memory
            gc.collect()

    def _compile(self, part: str, jobs: list[Job]) -> dict[tuple[int, str], Program]:
        runs = {(i, name): run for i, job in enumerate(jobs) for name, run in job.runs.items()}
        if runs:
            self.progress(f"{part}: compiling {len(runs)} programs")

        def failed(key: tuple[int, str], error: Exception) -> None:
            self.fail(part, f"{key[1]}: {jobs[key[0]].what}", error)

        return compile_all(runs, failed, self.settings.threads)

    def guarded(
        self, part: str, what: str, act: Callable[[], Iterator[dict[str, Any]]]
    ) -> Iterator[dict[str, Any]]:
        """Yields from `act()` unless the time is up; failures go into the document."""
        if self.is_late():
            self.fail(part, what, TimeoutError("not begun: the time was up"))
            return
        try:
            yield from act()
        except Exception as error:
            self.fail(part, what, error)

    def _timed(self, part: str, job: Job, compiled: dict[str, Program]) -> dict[str, Timing]:
        """Times the compiled programs of a job; a failure becomes an entry of the document."""
        found = {}
        for group in job.groups:
            alive = {name: run for name, run in group.items() if name in compiled}
            found |= time_in_turns(
                alive, self.settings.repeats, lambda what, error: self.fail(part, what, error)
            )
            for run in group.values():
                run.release()
        return found

    def is_late(self) -> bool:
        return time.perf_counter() - self.started > self.settings.seconds

    def fail(self, part: str, what: str, error: Exception) -> None:
        """Adds a failure to the document."""
        reason = f"{type(error).__name__}: {error}"[:2000]
        self.document["failures"].append({"part": part, "what": what, "error": reason})
        self.progress(
            f"failed: {part}: {what}: {''.join(traceback.format_exception(error))[-3000:]}"
        )
        self.write()

    def write(self) -> None:
        self.document["seconds"] = time.perf_counter() - self.started
        write_json(self.out_path, self.document)

    def add(self, record: dict[str, Any]) -> None:
        """Adds a record to the document."""
        self.document["records"].append({**record, "predicted": None})
        self.progress(f"{record['kind']}, {record['strategy']}: {_figure(record)}")
        self.write()


def _figure(record: dict[str, Any]) -> str:
    if "dram_bytes_per_tick" in record:
        return f"{record['dram_bytes_per_tick'] / 1e6:,.3g} MB read from DRAM a tick"
    return f"{1e6 * record['seconds_per_step']:,.1f} us" if record.get("seconds_per_step") else "-"
