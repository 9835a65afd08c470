"""Transports of the ring's message, compared with each other and with strategies without stages.

`measure_transport` times; `measure_rounds` compares tokens over many rounds, silences a stage, and
runs two rings at once. Both write after every record, as `measure.py` does.
"""

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from experiments.dense16.cases import LAYER_SIZES, DecodeCase, Scale, toy_model
from experiments.dense16.jobs import (
    STAGE,
    Job,
    Programs,
    Record,
    Timings,
    overhead_of,
    record_of,
    speed_of,
    stages_alone,
    tokens_of,
)
from experiments.dense16.measure import Session, Settings
from experiments.dense16.message import message_records
from experiments.dense16.model import PRESETS, Dense, random_array
from experiments.dense16.ring import Ring
from experiments.dense16.strategies import make_strategy
from experiments.dense16.strategy import Strategy
from experiments.dense16.timing import DecodeRun, digest
from layerwise_jax.decode import PeerStore, TransportError

# (transport, rounds that an iteration of the loop has written out).
RINGS = {"gpu": (("permute", 1), ("peer_store", 1), ("peer_store", 4)), "toy": (("permute", 1),)}
BATCHES = (32, 128, 8)
COUNTS = (16, 112)
# Steps of a program of the long comparison, and its rounds: of two stages, and of more.
LONG_STEPS = 1_000
LONG_ROUNDS, MORE_ROUNDS = 10_000, 2_000
SILENCE_SECONDS = 2.0


def models() -> dict[str, Dense]:
    """Networks of the size of a cache: 34 and 50 MB of weights per device."""
    heads, mlp = LAYER_SIZES[8]
    return {
        "8 x d=512": replace(PRESETS["l2"], layers=8, heads=heads, mlp=mlp),
        "4 x d=1024": PRESETS["l2"],
    }


def measure_transport(
    settings: Settings, path: Path, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Measures tokens/s of every strategy and transport, then a message without work; the
    document.
    """
    session = Session(settings, path, progress)
    devices = session.devices
    if settings.scale == "toy":
        cases = [DecodeCase(toy_model(len(devices)), (2, 6))]
    else:
        cases = [
            DecodeCase(replace(model, batch=batch), COUNTS)
            for model in models().values()
            for batch in BATCHES
        ]
    session.measure_jobs("transport", [_job(settings.scale, case, devices) for case in cases])
    for record in session.guarded("transport", "messages", partial(message_records, devices)):
        session.add(record)
    return session.document


def _job(scale: Scale, case: DecodeCase, devices: Sequence[Any]) -> Job:
    """One device, replicas, tensor parallelism and the rings in turns; then a stage without
    neighbours.
    """
    model, n = case.model, len(devices)
    there = SingleDeviceSharding(devices[-1])
    params = partial(model.params, random_array(model, 0, there))
    cache = partial(model.cache, model.batch, random_array(model, 1, there))
    strategies: dict[str, Strategy] = {
        f"layer-wise, {transport} x {rounds}": Ring(
            "layer-wise", model, devices, {"stage": n}, transport, rounds
        )
        for transport, rounds in RINGS[scale]
    }
    strategies["tensor"] = make_strategy("tensor", model, devices, tensor=n)
    strategies["replicas"] = make_strategy("replicas", model, devices, data=n)
    strategies["one device"] = make_strategy("one device", model, devices)
    runs = {name: DecodeRun(each, params, cache, case.counts) for name, each in strategies.items()}
    alone = stages_alone(scale, model, n, case.counts[1], devices)

    def records(programs: Programs, timings: Timings) -> Iterator[Record]:
        first = runs["one device"].tokens
        for name, run in reversed(runs.items()):
            if name not in timings:
                continue
            strategy = run.strategy
            about = record_of(
                "decode", "transport", model, strategy.name, strategy.shape, programs[name],
                timings[name],
            )  # fmt: skip
            about |= speed_of(model, timings[name].seconds) | {"steps": case.counts[1]}
            about |= tokens_of(run, first)
            if isinstance(strategy, Ring):
                about |= {"transport": strategy.transport, "rounds": strategy.rounds}
                if STAGE in timings:
                    about |= overhead_of(timings[name].seconds / n, timings)
            yield about

    return Job(str(case), (runs, alone), records)


def measure_rounds(settings: Settings, path: Path, progress: Callable[[str], None]) -> dict:
    """Tokens of many rounds with both transports, on rings of two devices and more; a silent stage;
    two rings at once. Returns the document.
    """
    session = Session(settings, path, progress)
    if settings.scale == "toy":
        base, rounds, transports = toy_model(4), 4, ("permute", "auto")
    else:
        base, rounds, transports = models()["8 x d=512"], LONG_ROUNDS, ("permute", "peer_store")
    for stages in range(2, len(session.devices) + 1):
        model = replace(base, layers=2 * stages, batch=16 * stages)
        trial = Trial(model, session.devices[:stages], rounds if stages == 2 else MORE_ROUNDS)
        acts = {"tokens": partial(trial.compare, transports), "two rings": trial.together}
        if settings.scale == "gpu":  # elsewhere there is no peer to silence
            acts["a silent stage"] = trial.silence
        for what, act in acts.items():
            session.progress(f"{stages} stages: {what}")
            for record in session.guarded("rounds", f"{stages} stages: {what}", act):
                session.add(record)
    return session.document


@dataclass(frozen=True)
class Trial:
    """Comparisons of rings on given devices.

    Attributes:
      model: the network; its batch is 16 sequences a stage.
      devices: one a stage.
      rounds: steps of every sequence.
    """

    model: Dense
    devices: Sequence[Any]
    rounds: int

    def compare(self, transports: Sequence[str]) -> Iterator[Record]:
        """One record per transport: digests of all tokens and of a cache at the end."""
        first = None
        for transport in transports:
            started = time.perf_counter()
            found = self._run(self._ring(transport), self.rounds)
            seconds = time.perf_counter() - started
            first = first or found
            yield self._about("exact", transport) | {
                "rounds": self.rounds,
                "seconds": seconds,
                "tokens_digest": found[0],
                "cache_digest": found[1],
                "same_as_first": found == first,
            }

    def silence(self) -> Iterator[Record]:
        """A stage that never sends: the exception, its delay, and the run after it."""
        ring = self._ring(PeerStore(wait_seconds=SILENCE_SECONDS))
        before = self._run(ring, 20)
        last = len(self.devices) - 1
        ring.ring._channel.mailboxes.silence(last)
        started = time.perf_counter()
        try:
            self._run(ring, 20)
            error = None
        except TransportError as raised:
            error = str(raised)
        seconds = time.perf_counter() - started
        yield self._about("silent", "peer_store") | {
            "silent_stage": last,
            "error": error,
            "seconds": seconds,
            "next_run_is_right": self._run(ring, 20) == before,
        }

    def together(self) -> Iterator[Record]:
        """Two rings of the same devices, run by two threads at the same time."""
        rings = [self._ring("auto") for _ in range(2)]
        want = [self._run(ring, 200) for ring in rings]
        got: list[Any] = [None, None]

        def run(i: int) -> None:
            got[i] = self._run(rings[i], 200)

        threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        yield self._about("together", "auto") | {"same": got == want}

    def _ring(self, transport: Any) -> Ring:
        shape = {"stage": len(self.devices)}
        return Ring("layer-wise", self.model, self.devices, shape, transport)

    def _run(self, ring: Ring, rounds: int) -> tuple[str | None, str]:
        """Digests of all tokens, and of the first group's cache at the end."""
        model, there = self.model, SingleDeviceSharding(self.devices[0])
        weights = ring.place(model.params(random_array(model, 0, there)))
        cache = model.cache(model.batch, random_array(model, 1, there))
        tokens = np.arange(model.batch, dtype=np.int32) % model.vocabulary
        state = ring.start(cache, tokens, np.full(model.batch, 4, np.int32))
        made = []
        steps = min(rounds, LONG_STEPS)
        for _ in range(rounds // steps):
            state, new = ring.run(weights, state, steps)
            made.append(new)
        held = jax.tree.leaves(ring.ring.gather_cache(state, 0))
        data = b"".join(np.asarray(leaf).tobytes() for leaf in held)
        return digest(np.concatenate(made)), hashlib.sha256(data).hexdigest()[:16]

    def _about(self, kind: str, transport: str) -> Record:
        model, stages = self.model, len(self.devices)
        return {
            "kind": kind,
            "part": "rounds",
            "strategy": "layer-wise",
            "transport": transport,
            "mesh": {"data": 1, "stage": stages, "tensor": 1},
            "model": model.record(),
            "batch": model.batch,
            "context": model.context,
        }
