"""What is measured, part by part, and written to a file after every record.

What fails, or what time is too short for, stands in the file with its reason; the rest goes on.
"""

import gc
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from experiments.dense16 import resident
from experiments.dense16.cases import (
    PARTS,
    DecodeCase,
    Part,
    Scale,
    StageCase,
    counter_cases,
    decode_cases,
    residency_cases,
    stage_cases,
)
from experiments.dense16.model import Dense, random_array
from experiments.dense16.runs import circumstances, write_json
from experiments.dense16.stage import StageLoop
from experiments.dense16.strategies import fitting, make_strategy
from experiments.dense16.timing import DecodeRun, Program, Run, StageRun, Timing, compile_all, digest, time_in_turns

# The fastest at which an H200's memory was read, bytes a second: the floor of what must read its weights and its cache.
READ_BANDWIDTH = 4.6e12
# Calls of a stage's program in a short and a long run; a toy's take too little time to be told apart.
CALLS: dict[Scale, tuple[int, int]] = {"gpu": (1, 5), "toy": (0, 5)}
PROFILE_SECONDS = 90.0


@dataclass(frozen=True)
class Settings:
    """What to measure.

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


def run(settings: Settings, out_path: Path, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Measure, and write the document to `out_path` after every case; returns it."""
    session = Session(settings, out_path, progress)
    for part in settings.parts or PARTS[settings.scale]:
        for case in session.cases(part):
            if session.is_late():
                session.fail(part, str(case), TimeoutError("not begun: the time was up"))
                continue
            progress(f"{part}: {case}")
            try:
                session.measure(part, case)
            except Exception as error:
                session.fail(part, str(case), error)
            session.write()
            gc.collect()  # what failed may be held by its own traceback, and the next case needs the memory
    return session.document


class Session:
    """One run of the measurements: the document as it grows."""

    def __init__(self, settings: Settings, out_path: Path, progress: Callable[[str], None]):
        self.settings, self.out_path, self.progress = settings, out_path, progress
        self.devices = jax.local_devices()[: settings.devices]
        self.started = time.perf_counter()
        self.document: dict[str, Any] = {**circumstances(), "records": [], "failures": []}
        self.document["machine"]["count"] = len(self.devices)

    def cases(self, part: Part) -> list[Any]:
        """The cases of a part."""
        if part == "stage":
            return stage_cases(self.settings.scale)
        if part == "residency":
            return residency_cases(self.settings.scale)
        if part == "counters":
            return counter_cases()
        return decode_cases(self.settings.scale, part, len(self.devices))

    def measure(self, part: Part, case: Any) -> None:
        """One case."""
        if part == "stage":
            self._stage(case)
        elif part == "residency":
            self._residency(case)
        elif part == "counters":
            self._counters(*case)
        else:
            self._decode(part, case)

    def is_late(self) -> bool:
        return time.perf_counter() - self.started > self.settings.seconds

    def fail(self, part: Part, what: str, error: Exception) -> None:
        """Put a failure into the document."""
        reason = f"{type(error).__name__}: {error}"[:2000]
        self.document["failures"].append({"part": part, "what": what, "error": reason})
        self.progress(f"failed: {part}: {what}: {''.join(traceback.format_exception(error))[-3000:]}")
        self.write()

    def write(self) -> None:
        self.document["seconds"] = time.perf_counter() - self.started
        write_json(self.out_path, self.document)

    def add(self, record: dict[str, Any]) -> None:
        """Put a record into the document."""
        self.document["records"].append({**record, "predicted": None})
        seconds = record.get("seconds_per_step")
        self.progress(f"{record['kind']}, {record['strategy']}: " + (f"{1e6 * seconds:,.1f} us" if seconds else "-"))
        self.write()

    def _timed(self, part: Part, runs: Mapping[str, Run]) -> tuple[dict[str, Program], dict[str, Timing]]:
        """All runs, compiled and timed in turns; those that fail are put into the document."""

        def failed(name: str, error: Exception) -> None:
            self.fail(part, name, error)

        programs = compile_all(runs, failed, self.settings.threads)
        alive = {name: runs[name] for name in programs}
        return programs, time_in_turns(alive, self.settings.repeats, failed)

    def _decode(self, part: Part, case: DecodeCase) -> None:
        """All strategies, and beside them the layer-wise stage by itself."""
        model, runs = case.model, self._decode_runs(case)
        stages = runs["layer-wise"].strategy.shape["stage"] if "layer-wise" in runs else 0
        alone = self._stages_alone(model, stages, case.counts[1]) if stages else {}
        programs, timings = self._timed(part, {**runs, **alone})
        first = runs["one device"].tokens
        for name, each in runs.items():
            if name in timings:
                record = self._record("decode", part, model, name, each.strategy.shape, programs[name], timings[name])
                step = timings[name].seconds
                record |= {"tokens_per_second": model.batch / step, "seconds_per_token": step / model.batch}
                record |= {"inter_token_latency": step, "steps": case.counts[1], "tokens_digest": digest(each.tokens)}
                if first is not None and each.tokens is not None:
                    record |= {"same_first_tokens": float((first[0] == each.tokens[0]).mean())}
                    record |= {"same_tokens": float((first == each.tokens).mean())}
                self.add(record)
        if "layer-wise" in timings and "stage" in timings:
            self._overhead(part, model, stages, programs, timings)

    def _decode_runs(self, case: DecodeCase) -> dict[str, DecodeRun]:
        # One device alone holds most, and it is the first.
        model, there = case.model, SingleDeviceSharding(self.devices[-1])
        params = partial(model.params, random_array(model, 0, there))
        cache = partial(model.cache, model.batch, random_array(model, 1, there))
        runs = {}
        for name, shape in fitting(model, len(self.devices)):
            strategy = make_strategy(name, model, self.devices, **shape)
            runs[name] = DecodeRun(strategy, params, cache, case.counts)
        return runs

    def _stages_alone(self, model: Dense, stages: int, ticks: int) -> dict[str, StageRun]:
        """The layer-wise stage in a loop on one device, without and with what first and last stage do besides."""
        stage = replace(model, layers=model.layers // stages, batch=model.batch // stages)
        rounds = max(1, min(ticks, model.context // 2) // 2)
        return {
            name: StageRun(
                StageLoop(stage, self.devices[0], stages, 1, stages, rounds, has_ends), CALLS[self.settings.scale]
            )
            for name, has_ends in (("stage", False), ("stage with ends", True))
        }

    def _overhead(
        self, part: Part, model: Dense, stages: int, programs: Mapping[str, Program], timings: Mapping[str, Timing]
    ) -> None:
        """What a tick of the ring takes besides its stage."""
        tick = timings["layer-wise"].seconds / stages
        mesh = {"data": 1, "stage": stages, "tensor": 1}
        record = self._record("overhead", part, model, "layer-wise", mesh, programs["stage"], timings["stage"])
        record |= {"tick_seconds": tick, "stage_seconds": timings["stage"].seconds}
        record |= {"overhead_seconds": tick - timings["stage"].seconds}
        if "stage with ends" in timings:
            record |= {"stage_with_ends_seconds": timings["stage with ends"].seconds}
            record |= {"overhead_over_ends_seconds": tick - timings["stage with ends"].seconds}
        self.add(record)

    def _stage(self, case: StageCase) -> None:
        """A stage against the time that its memory takes."""
        model = case.model
        programs, timings = self._timed("stage", {"stage": self._stage_run(case)})
        floor = (model.layers * (model.layer_bytes + model.batch * model.sequence_bytes)) / READ_BANDWIDTH
        for name, timing in timings.items():
            record = self._record("stage", "stage", model, "one device", {}, programs[name], timing)
            record |= {"tokens_per_second": model.batch / timing.seconds, "memory_bandwidth": READ_BANDWIDTH}
            self.add({**record, "floor_seconds": floor, "floor_share": floor / timing.seconds})

    def _residency(self, pair: tuple[StageCase, StageCase]) -> None:
        """The same stage with weights that stay and with weights that are streamed."""
        cases: dict[str, StageCase] = dict(zip(("resident", "streaming"), pair, strict=True))
        programs, timings = self._timed("residency", {name: self._stage_run(case) for name, case in cases.items()})
        for name, timing in timings.items():
            model = cases[name].model
            record = self._record("residency", "residency", model, "one device", {}, programs[name], timing)
            record |= {"weights": name, "stage_weight_bytes": model.layers * model.layer_bytes}
            self.add({**record, "groups": cases[name].groups, "copies": cases[name].copies})

    def _stage_run(self, case: StageCase) -> StageRun:
        loop = StageLoop(case.model, self.devices[0], case.groups, case.copies, case.ticks, case.rounds)
        return StageRun(loop, CALLS[self.settings.scale])

    def _counters(self, layer_mib: int, is_streamed: bool) -> None:
        """Bytes read from DRAM in a tick."""
        microbatch, copies = 8, resident.TICKS if is_streamed else 1
        size, kernels = resident.dram_bytes(layer_mib, copies, microbatch, PROFILE_SECONDS)
        model = resident.profiled_model(layer_mib, microbatch)
        weights = "streaming" if is_streamed else "resident"
        self.add(
            {
                **_described("residency", "counters", model, "one device", {}),
                "weights": weights,
                "stage_weight_bytes": model.layer_bytes,
                "cache_bytes_per_tick": model.batch * model.sequence_bytes,
                "dram_bytes_per_tick": size,
                "dram_bytes_per_tick_by_kernel": kernels,
            }
        )

    def _record(
        self,
        kind: str,
        part: Part,
        model: Dense,
        strategy: str,
        mesh: Mapping[str, int],
        program: Program,
        timing: Timing,
    ) -> dict[str, Any]:
        about = {"bytes_per_device": program.device_bytes, "compile_seconds": program.seconds}
        return {**_described(kind, part, model, strategy, mesh), **timing.record(), **about}


def _described(kind: str, part: Part, model: Dense, strategy: str, mesh: Mapping[str, int]) -> dict[str, Any]:
    return {
        "kind": kind,
        "part": part,
        "strategy": strategy,
        "mesh": {"data": 1, "stage": 1, "tensor": 1, **mesh},
        "model": model.record(),
        "batch": model.batch,
        "context": model.context,
    }
