"""Variants of the peer store in the ring, and where a tick's time goes, from a profile."""

import glob
import statistics
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData
from jax.sharding import SingleDeviceSharding

from experiments.dense16.cases import toy_model
from experiments.dense16.jobs import speed_of
from experiments.dense16.measure import Session, Settings
from experiments.dense16.model import Dense, random_array
from experiments.dense16.ring import Ring
from experiments.dense16.timing import DecodeRun, compile_all, time_in_turns
from experiments.dense16.transport import COUNTS, models
from layerwise_jax.decode import PeerStore, Permute

Record = dict[str, Any]


@dataclass(frozen=True)
class RidingTokens(PeerStore):
    """One array a message: tokens ride in the activations."""

    @property
    def tokens_ride(self) -> bool:
        return True


VARIANTS: dict[str, Any] = {
    "permute": Permute(),
    "peer_store": PeerStore(),
    "1024 threads": PeerStore(block_threads=1024),
    "tokens ride": RidingTokens(),
    "tokens ride, 1024 threads": RidingTokens(block_threads=1024),
}


def measure_variants(
    settings: Settings, path: Path, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Tokens/s of every variant in turns, and profiles of two; returns the document."""
    session = Session(settings, path, progress)
    is_gpu = settings.scale == "gpu"
    base = replace(models()["8 x d=512"], batch=32) if is_gpu else toy_model(2)
    variants = VARIANTS if is_gpu else {"permute": Permute()}
    runs = {
        name: _run(base, session.devices, transport, COUNTS if is_gpu else (2, 6))
        for name, transport in variants.items()
    }
    for record in session.guarded("variants", "all", partial(_records, session, base, runs)):
        session.add(record)
    return session.document


def _run(
    model: Dense, devices: Sequence[Any], transport: Any, counts: tuple[int, int]
) -> DecodeRun:
    there = SingleDeviceSharding(devices[-1])
    params = partial(model.params, random_array(model, 0, there))
    cache = partial(model.cache, model.batch, random_array(model, 1, there))
    ring = Ring("layer-wise", model, devices, {"stage": len(devices)}, transport)
    return DecodeRun(ring, params, cache, counts)


def _records(session: Session, model: Dense, runs: dict[str, DecodeRun]) -> Iterator[Record]:
    def failed(name: str, error: Exception) -> None:
        session.fail("variants", name, error)

    programs = compile_all(runs, failed, session.settings.threads)
    alive = {name: run for name, run in runs.items() if name in programs}
    timings = time_in_turns(alive, session.settings.repeats, failed)
    for name, timing in timings.items():
        about = {"kind": "variant", "part": "variants", "strategy": "layer-wise", "variant": name}
        yield about | timing.record() | speed_of(model, timing.seconds)
    for name in timings:
        if name in ("permute", "peer_store"):
            about = {"kind": "profile", "part": "variants", "strategy": "layer-wise"}
            yield about | {"variant": name} | profiled(alive[name])


def profiled(run: DecodeRun) -> Record:
    """Kernels and gaps of a long program on the first device, in microseconds per step."""
    steps = run.counts[-1]
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run.seconds(steps)
        (found,) = glob.glob(folder + "/**/*.xplane.pb", recursive=True)
        events = kernels(ProfileData.from_file(found))
    if not events:
        return {"events": 0}
    busy: dict[str, float] = defaultdict(float)
    gaps: dict[str, list[float]] = defaultdict(list)
    last_end, last_name = events[0][0], ""
    for start, length, name in events:
        busy[name] += length / 1e3 / steps
        if start > last_end:
            gaps[f"{last_name} -> {name}"].append((start - last_end) / 1e3)
        last_end, last_name = max(last_end, start + length), name
    by_pair = {pair: sum(each) / steps for pair, each in gaps.items()}
    return {
        "events": len(events),
        "kernels_per_step": len(events) / steps,
        "busy_us": sum(busy.values()),
        "gaps_us": sum(by_pair.values()),
        "span_us": (last_end - events[0][0]) / 1e3 / steps,
        "longest_kernels": dict(Counter(busy).most_common(20)),
        "longest_gaps": {
            pair: [by_pair[pair], len(gaps[pair]), statistics.median(gaps[pair])]
            for pair, _ in Counter(by_pair).most_common(20)
        },
    }


def kernels(profile: Any) -> list[tuple[float, float, str]]:
    """(start ns, length ns, name) of every kernel of the first GPU, by start."""
    found = []
    for plane in profile.planes:
        if not plane.name.startswith("/device:GPU:0"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            found += [(e.start_ns, e.duration_ns, e.name[:60]) for e in line.events]
    return sorted(found)
