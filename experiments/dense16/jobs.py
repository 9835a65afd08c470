"""Measurement jobs: programs that are timed in turns, and the records that they produce."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from jax.sharding import SingleDeviceSharding

from experiments.dense16.cases import (
    DecodeCase,
    Part,
    Scale,
    StageCase,
    counter_cases,
    decode_cases,
    residency_cases,
    stage_cases,
)
from experiments.dense16.counters import dram_bytes_read
from experiments.dense16.model import Dense, random_array
from experiments.dense16.stage import StageLoop
from experiments.dense16.strategies import fitting, make_strategy
from experiments.dense16.timing import DecodeRun, Program, Run, StageRun, Timing, digest

Record = dict[str, Any]
Programs = Mapping[str, Program]
Timings = Mapping[str, Timing]

# The fastest at which an H200's memory was read, bytes a second: the floor of what must read its
# weights and its cache.
READ_BANDWIDTH = 4.6e12
# Calls of a stage's program in a short and a long run; a toy's take too little time to be told
# apart.
CALLS: dict[Scale, tuple[int, int]] = {"gpu": (1, 5), "toy": (0, 5)}
# Calls of a stage's program while its bytes are counted.
COUNTED_CALLS = 20
STAGE, STAGE_WITH_ENDS, LAST_WITH_ENDS = "stage", "stage with ends", "stage with ends, last device"


@dataclass(frozen=True)
class Job:
    """Runs that are timed in turns, and the function that makes their records.

    Attributes:
      what: which case it is.
      groups: runs by name. Those of a group are timed in turns; before the next group they leave
        the memory.
      records: makes the records of all that were compiled and timed.
    """

    what: str
    groups: Sequence[Mapping[str, Run]]
    records: Callable[[Programs, Timings], Iterator[Record]]

    @property
    def runs(self) -> dict[str, Run]:
        """All runs."""
        return {name: run for group in self.groups for name, run in group.items()}


def jobs_of(part: Part, scale: Scale, devices: Sequence[Any]) -> list[Job]:
    """Jobs of one part of the measurements."""
    if part == "stage":
        return [_stage_job(scale, case, devices[0]) for case in stage_cases(scale)]
    if part == "residency":
        return [_residency_job(scale, *pair, devices[0]) for pair in residency_cases(scale)]
    if part == "counters":
        return [_counters_job(scale, case, devices[0]) for case in counter_cases(scale)]
    return [
        _decode_job(scale, part, case, devices) for case in decode_cases(scale, part, len(devices))
    ]


def _decode_job(scale: Scale, part: Part, case: DecodeCase, devices: Sequence[Any]) -> Job:
    """All strategies, followed by the layer-wise stage without neighbours."""
    model = case.model
    runs = _decode_runs(case, devices)
    stages = runs["layer-wise"].strategy.shape["stage"] if "layer-wise" in runs else 0
    alone = stages_alone(scale, model, stages, case.counts[1], devices) if stages else {}

    def records(programs: Programs, timings: Timings) -> Iterator[Record]:
        first = runs["one device"].tokens
        for name, each in reversed(runs.items()):
            if name in timings:
                about = record_of(
                    "decode", part, model, name, each.strategy.shape, programs[name], timings[name]
                )
                yield (
                    about
                    | speed_of(model, timings[name].seconds)
                    | {"steps": case.counts[1]}
                    | tokens_of(each, first)
                )
        if "layer-wise" in timings and STAGE in timings:
            mesh = {"data": 1, "stage": stages, "tensor": 1}
            about = record_of(
                "overhead", part, model, "layer-wise", mesh, programs[STAGE], timings[STAGE]
            )
            yield about | overhead_of(timings["layer-wise"].seconds / stages, timings)

    return Job(str(case), (runs, alone), records)


def _decode_runs(case: DecodeCase, devices: Sequence[Any]) -> dict[str, DecodeRun]:
    """All strategies that fit; those with stages first, since their start needs the most memory."""
    # The last device has the most room left: one device alone holds most, and it is the first.
    model, there = case.model, SingleDeviceSharding(devices[-1])
    params = partial(model.params, random_array(model, 0, there))
    cache = partial(model.cache, model.batch, random_array(model, 1, there))
    return {
        name: DecodeRun(make_strategy(name, model, devices, **shape), params, cache, case.counts)
        for name, shape in reversed(fitting(model, len(devices)))
    }


def stages_alone(
    scale: Scale, model: Dense, stages: int, ticks: int, devices: Sequence[Any]
) -> dict[str, StageRun]:
    """The layer-wise stage in a loop on one device, without and with the work of first and last
    stage.
    """
    stage = replace(model, layers=model.layers // stages, batch=model.batch // stages)
    rounds = max(1, min(ticks, model.context // 2) // 2)
    return {
        name: StageRun(StageLoop(stage, device, stages, 1, stages, rounds, has_ends), CALLS[scale])
        for name, device, has_ends in (
            (STAGE, devices[0], False),
            (STAGE_WITH_ENDS, devices[0], True),
            (LAST_WITH_ENDS, devices[-1], True),  # devices differ by a percent or two
        )
    }


def speed_of(model: Dense, step: float) -> Record:
    """Rates and latencies that follow from the seconds of one step."""
    return {
        "tokens_per_second": model.batch / step,
        "seconds_per_token": step / model.batch,
        "inter_token_latency": step,
    }


def tokens_of(run: DecodeRun, first: Any) -> Record:
    """Digest of the tokens, and the shares that equal one device's: of the first step, and of
    all.
    """
    found: Record = {"tokens_digest": digest(run.tokens)}
    if first is not None and run.tokens is not None:
        found |= {"same_first_tokens": float((first[0] == run.tokens[0]).mean())}
        found |= {"same_tokens": float((first == run.tokens).mean())}
    return found


def overhead_of(tick: float, timings: Timings) -> Record:
    """Seconds of a ring's tick beyond its stage, and beyond the slower device's stage with its
    ends.
    """
    found = {"tick_seconds": tick, "stage_seconds": timings[STAGE].seconds}
    found |= {"overhead_seconds": tick - timings[STAGE].seconds}
    ends = [timings[name].seconds for name in (STAGE_WITH_ENDS, LAST_WITH_ENDS) if name in timings]
    if ends:
        found |= {
            "stage_with_ends_seconds": max(ends),
            "overhead_over_ends_seconds": tick - max(ends),
        }
    return found


def _stage_job(scale: Scale, case: StageCase, device: Any) -> Job:
    """A stage against the time that its memory traffic takes."""
    model = case.model
    floor = (
        model.layers * (model.layer_bytes + model.batch * model.sequence_bytes)
    ) / READ_BANDWIDTH

    def records(programs: Programs, timings: Timings) -> Iterator[Record]:
        for name, timing in timings.items():
            record = record_of("stage", "stage", model, "one device", {}, programs[name], timing)
            record |= {
                "tokens_per_second": model.batch / timing.seconds,
                "memory_bandwidth": READ_BANDWIDTH,
            }
            yield record | {"floor_seconds": floor, "floor_share": floor / timing.seconds}

    return Job(str(case), ({STAGE: _stage_run(scale, case, device)},), records)


def _residency_job(scale: Scale, stays: StageCase, streams: StageCase, device: Any) -> Job:
    """The same stage with resident and with streamed weights."""
    cases = {case.weights: case for case in (stays, streams)}

    def records(programs: Programs, timings: Timings) -> Iterator[Record]:
        for name, timing in timings.items():
            model = cases[name].model
            record = record_of(
                "residency", "residency", model, "one device", {}, programs[name], timing
            )
            yield record | cases[name].record()

    return Job(
        str(stays),
        ({name: _stage_run(scale, case, device) for name, case in cases.items()},),
        records,
    )


def _stage_run(scale: Scale, case: StageCase, device: Any) -> StageRun:
    return StageRun(
        StageLoop(case.model, device, case.groups, case.copies, case.ticks, case.rounds),
        CALLS[scale],
    )


def _counters_job(scale: Scale, case: StageCase, device: Any) -> Job:
    """Bytes that a stage reads from DRAM per tick."""
    run = _stage_run(scale, case, device)

    def records(programs: Programs, timings: Timings) -> Iterator[Record]:
        run.prepare()
        try:
            run.seconds(1)  # what the first call reads besides is none of the steady state's
            size = dram_bytes_read(device, lambda: run.seconds(COUNTED_CALLS)) / (
                COUNTED_CALLS * run.steps_a_unit
            )
        finally:
            run.release()
        about = _described("counters", "counters", case.model, "one device", {})
        yield about | case.record() | {"dram_bytes_per_tick": size}

    return Job(str(case), (), records)


def record_of(
    kind: str,
    part: str,
    model: Dense,
    strategy: str,
    mesh: Mapping[str, int],
    program: Program,
    timing: Timing,
) -> Record:
    """Record of one strategy: mesh, times, and bytes per device."""
    about = {"bytes_per_device": program.device_bytes, "compile_seconds": program.seconds}
    return {**_described(kind, part, model, strategy, mesh), **timing.record(), **about}


def _described(
    kind: str, part: str, model: Dense, strategy: str, mesh: Mapping[str, int]
) -> dict[str, Any]:
    return {
        "kind": kind,
        "part": part,
        "strategy": strategy,
        "mesh": {"data": 1, "stage": 1, "tensor": 1, **mesh},
        "model": model.record(),
        "batch": model.batch,
        "context": model.context,
    }
