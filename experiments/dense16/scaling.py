"""Scaling: every strategy in every shape, at a given depth and the longest context that fits."""

import dataclasses
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from experiments.dense16.jobs import record_of, speed_of
from experiments.dense16.model import Dense, random_array
from experiments.dense16.runs import circumstances, write_json
from experiments.dense16.strategies import make_strategy
from experiments.dense16.timing import (
    DecodeRun,
    Program,
    Timing,
    compile_all,
    digest,
    time_in_turns,
)
from layerwise_jax.simulate import Strategy as Shape
from layerwise_jax.simulate import strategy_of

# Steps of the short and of the long program: of a large layer, and of one that takes microseconds.
COUNTS, SMALL_COUNTS = (4, 20), (16, 144)
LARGE_LAYER_BYTES = 2**27
# Of a device's memory, for weights and caches; the rest is workspace. Taken where a device does not
# say what it has.
MEMORY_SHARE = 0.85
UNKNOWN_MEMORY = 2**30


@dataclass(frozen=True)
class Scaling:
    """Options of a scaling measurement.

    Attributes:
      models: the networks, each with the longest context to take; their layers are replaced.
      devices: how many.
      layers: of the networks, one case each.
      strategies: names of those that are wanted.
      seconds: after which no case is begun.
      repeats: of every time.
      threads: programs that are compiled at a time.
    """

    models: tuple[Dense, ...]
    devices: int
    layers: tuple[int, ...]
    strategies: tuple[str, ...]
    seconds: float
    repeats: int
    threads: int


def shapes(model: Dense, count: int) -> list[Shape]:
    """Every strategy in every shape that uses all devices and splits the model; one device."""
    found = (
        [Shape("one device"), Shape("replicas", data=count)] if count > 1 else [Shape("one device")]
    )
    ways = [(k, count // k) for k in range(1, count + 1) if count % k == 0 and count > 1]
    return [
        shape for shape in found + [strategy_of(1, k, n) for k, n in ways] if _splits(model, shape)
    ]


def _splits(model: Dense, shape: Shape) -> bool:
    whole = model.layers % shape.stage == 0 and model.batch % (shape.data * shape.stage) == 0
    return whole and model.heads % shape.tensor == 0 and model.mlp % shape.tensor == 0


def device_bytes(model: Dense, shape: Shape) -> float:
    """Bytes of weights and caches per device."""
    weights = model.layers * model.layer_bytes / (shape.stage * shape.tensor)
    return weights + model.layers * model.batch * model.sequence_bytes / shape.num_devices


def longest_context(model: Dense, shape: Shape, memory: float) -> int:
    """Longest context that fits, at most the model's, in steps of 64 (of 1 below that); 0 for
    none.
    """
    without = device_bytes(dataclasses.replace(model, context=0), shape)
    position = (device_bytes(model, shape) - without) / model.context
    fits = min(model.context, int((memory - without) // position))
    return fits - fits % 64 if fits > 64 and fits < model.context else max(fits, 0)


def step_counts(model: Dense) -> tuple[int, int]:
    """Step counts of the short and of the long program."""
    return COUNTS if model.layer_bytes >= LARGE_LAYER_BYTES else SMALL_COUNTS


def cases(scaling: Scaling, memory: float) -> Iterator[tuple[Dense, list[Shape]]]:
    """Models with their shapes: at the longest context for several devices, then for one device."""
    for model in (
        dataclasses.replace(each, layers=n) for each in scaling.models for n in scaling.layers
    ):
        wanted = [
            shape for shape in shapes(model, scaling.devices) if shape.name in scaling.strategies
        ]
        spread = [shape for shape in wanted if shape.num_devices > 1] or wanted
        longest = [
            min(longest_context(model, shape, memory) for shape in some)
            for some in (spread, wanted)
            if some
        ]
        for context in dict.fromkeys(longest):
            if context > max(step_counts(model)):
                own = dataclasses.replace(model, context=context)
                yield own, [shape for shape in wanted if device_bytes(own, shape) <= memory]


def measure_scaling(
    scaling: Scaling, path: Path, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Measures one strategy after the other, each with all memory; returns the document."""
    started = perf_counter()
    document = {**circumstances(), "records": [], "failures": []}
    document["machine"]["count"] = scaling.devices
    for model, wanted in cases(scaling, _memory()):

        def failed(name: str, error: Exception, model: Dense = model) -> None:
            reason = "".join(traceback.format_exception_only(error))[:2000]
            document["failures"].append(
                {"part": "scaling", "what": f"{name}: {model}", "error": reason}
            )

        if perf_counter() - started > scaling.seconds:
            failed("all", TimeoutError("not begun: the time was up"))
            continue
        for record in _measure_case(scaling, model, wanted, failed, progress):
            document["records"].append(record)
            write_json(path, document)
    write_json(path, document)
    return document


def _memory() -> float:
    """Bytes of a device that weights and caches may take."""
    return MEMORY_SHARE * (jax.local_devices()[0].memory_stats() or {}).get(
        "bytes_limit", UNKNOWN_MEMORY
    )


def _measure_case(
    scaling: Scaling,
    model: Dense,
    wanted: list[Shape],
    failed: Callable[[str, Exception], None],
    progress: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """Measures one model; one record per shape."""
    devices = jax.local_devices()[: scaling.devices]
    progress(f"compiling {len(wanted)} strategies: {model}")
    params = partial(model.params, random_array(model, 0, SingleDeviceSharding(devices[0])))
    shaped = {f"{shape.name}, {shape.mesh}": shape for shape in wanted}
    runs: dict[str, DecodeRun] = {}
    for label, shape in shaped.items():
        try:
            strategy = make_strategy(shape.name, model, devices, **shape.mesh)
        except Exception as error:
            failed(label, error)
            continue
        runs[label] = DecodeRun(strategy, params, None, step_counts(model))
    programs = compile_all(runs, failed, scaling.threads)
    for label, program in programs.items():
        progress(label)
        run = runs.pop(label)
        timings = time_in_turns({label: run}, scaling.repeats, failed)
        if label in timings:
            yield _record(model, shaped[label], program, timings[label], run.tokens)


def _record(
    model: Dense, shape: Shape, program: Program, timing: Timing, tokens: np.ndarray | None
) -> dict[str, Any]:
    record = record_of("decode", "scaling", model, shape.name, shape.mesh, program, timing)
    about = {"steps": step_counts(model)[-1], "tokens_digest": digest(tokens), "predicted": None}
    return record | speed_of(model, timing.seconds) | about
