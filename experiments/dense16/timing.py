"""Steady-state times: programs are compiled first, warmed up, and run in turns."""

import hashlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from experiments.dense16.stage import StageLoop
from experiments.dense16.strategy import Strategy


class Run(Protocol):
    """Timed program; its unit is a step, or one call."""

    @property
    def counts(self) -> tuple[int, int]:
        """Two counts of units; times are compared by their differences."""
        ...

    @property
    def steps_a_unit(self) -> int:
        """Steps or ticks per unit."""
        ...

    def compile(self) -> Any:
        """Compiles all programs of the run; returns the longest as `jax.stages.Compiled`."""
        ...

    def prepare(self) -> None:
        """Puts weights and state on the devices."""
        ...

    def seconds(self, count: int) -> float:
        """Seconds of `units` units, from dispatch to completion."""
        ...

    def release(self) -> None:
        """Frees weights and state."""
        ...


@dataclass
class DecodeRun:
    """A strategy from a fixed start: the same parameters, cache, tokens and positions each time.

    Attributes:
      strategy: what runs.
      params, cache: make them whole, where there is room for them besides what the runs hold. A
        cache of None is one of zeros, made where it lies: no device ever holds all of it.
      counts: steps of the short program, or 0 for none, and of the long one.
      tokens: what the long program generated last, int32[steps, batch].
    """

    strategy: Strategy
    params: Callable[[], Any]
    cache: Callable[[], Any] | None
    counts: tuple[int, int]
    tokens: np.ndarray | None = None
    steps_a_unit: int = 1

    def compile(self) -> Any:
        return [self.strategy.compile(steps) for steps in self.counts if steps][-1]

    def prepare(self) -> None:
        self._weights = self.strategy.place(self.params())
        self._state = (
            self.strategy.start(self.cache(), *self._inputs()) if self.cache else self._zeros()
        )
        jax.block_until_ready((self._weights, self._state))

    def seconds(self, count: int) -> float:
        if not count:
            return 0.0
        self._state = jax.block_until_ready(self.strategy.rewind(self._state, *self._inputs()))
        started = time.perf_counter()
        self._state, tokens = self.strategy.run(self._weights, self._state, count)
        jax.block_until_ready(self._state)
        seconds = time.perf_counter() - started
        if count == self.counts[-1]:
            self.tokens = tokens
        return seconds

    def release(self) -> None:
        self._weights = self._state = None

    def _zeros(self) -> Any:
        program = self.strategy.compile(self.counts[-1])
        types, shardings = program.args_info[0][1], program.input_shardings[0][1]
        return jax.tree.map(
            lambda x, where: jnp.zeros(x.shape, x.dtype, device=where), types, shardings
        )

    def _inputs(self) -> tuple[np.ndarray, np.ndarray]:
        """First tokens, and positions near the end of the context: all steps read about as much of
        it.
        """
        model = self.strategy.model
        tokens = np.arange(model.batch, dtype=np.int32) % model.vocabulary
        return tokens, np.full(
            model.batch, model.context - min(max(self.counts), model.context // 8), np.int32
        )


@dataclass
class StageRun:
    """A stage's loop; its program is called several times without waiting in between."""

    loop: StageLoop
    counts: tuple[int, int]

    @property
    def steps_a_unit(self) -> int:
        return self.loop.ticks_of_program

    def compile(self) -> Any:
        return self.loop.program

    def prepare(self) -> None:
        self._weights = self.loop.weights()
        self._state: Any = self.loop.start()
        jax.block_until_ready((self._weights, self._state))

    def seconds(self, count: int) -> float:
        starts = jax.block_until_ready([self.loop.positions() for _ in range(count)])
        started = time.perf_counter()
        for positions in starts:
            self._state = self.loop.program(
                self._weights, self._state._replace(positions=positions)
            )
        jax.block_until_ready(self._state)
        return time.perf_counter() - started

    def release(self) -> None:
        self._weights = self._state = None


@dataclass(frozen=True)
class Timing:
    """Seconds per step or tick.

    Attributes:
      repeats: of every repetition, by the difference of a long and a short run.
      plain: the median of the long run by its steps, dispatch and the pipeline's filling included.
    """

    repeats: tuple[float, ...]
    plain: float

    @property
    def seconds(self) -> float:
        """Median of `repeats`."""
        return statistics.median(self.repeats)

    def record(self) -> dict[str, Any]:
        """Fields of a record that describe the times."""
        return {
            "seconds_per_step": self.seconds,
            "spread": [min(self.repeats), max(self.repeats)],
            "plain_seconds_per_step": self.plain,
            "repeats": list(self.repeats),
        }


@dataclass(frozen=True)
class Program:
    """Compile seconds, and bytes per device."""

    seconds: float
    device_bytes: int


def compile_all[K](
    runs: Mapping[K, Run], failed: Callable[[K, Exception], None], threads: int
) -> dict[K, Program]:
    """Compiles several programs at a time; failures are reported and left out."""

    def compile_one(run: Run) -> Program | Exception:
        started = time.perf_counter()
        try:
            sizes = run.compile().memory_analysis()
        except Exception as error:
            return error
        held = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
        return Program(time.perf_counter() - started, held + sizes.temp_size_in_bytes)

    # The compiler times kernels under a lock on the GPU, so that programs compiled at once do not
    # disturb each other.
    with ThreadPoolExecutor(threads) as pool:
        found = dict(zip(runs, pool.map(compile_one, runs.values()), strict=True))
    for name, each in found.items():
        if isinstance(each, Exception):
            failed(name, each)
    return {name: each for name, each in found.items() if isinstance(each, Program)}


def time_in_turns(
    runs: Mapping[str, Run], repeats: int, failed: Callable[[str, Exception], None]
) -> dict[str, Timing]:
    """Prepares and warms up all runs, then times all `repeats` times; failures are reported and
    left out.
    """
    alive = dict(runs)

    def guarded(name: str, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except Exception as error:
            del alive[name]
            failed(name, error)
            return None

    for name, run in runs.items():
        guarded(name, run.prepare)
    for name, run in list(alive.items()):
        guarded(name, lambda run=run: [run.seconds(count) for count in run.counts])
    found: dict[str, list[list[float]]] = {name: [] for name in alive}
    for _ in range(repeats):
        for name, run in list(alive.items()):
            found[name].append(
                guarded(name, lambda run=run: [run.seconds(count) for count in run.counts])
            )
    return {name: _timing(run, found[name]) for name, run in alive.items()}


def _timing(run: Run, pairs: Sequence[Sequence[float]]) -> Timing:
    short, long = (count * run.steps_a_unit for count in run.counts)
    return Timing(
        tuple((second - first) / (long - short) for first, second in pairs),
        statistics.median(second / long for _, second in pairs),
    )


def digest(tokens: np.ndarray | None) -> str | None:
    """Hash of an array of tokens."""
    return (
        None
        if tokens is None
        else hashlib.sha256(np.ascontiguousarray(tokens, np.int32).tobytes()).hexdigest()[:16]
    )
