"""Strategies compiled, then run in turns: losses from one start, steady-state times, memory."""

import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from experiments.training.gpu_strategies import Strategy

COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


@dataclass(frozen=True, eq=False)
class Compiled:
    """A strategy's step, compiled.

    Attributes:
      strategy: a `Strategy`, or what has its name, figures and `start`.
      call: (state, tokens) to (state, loss).
      figures: what compiling told, for results.
    """

    strategy: Any
    call: Callable[..., Any]
    figures: dict[str, Any]


def compile_step(strategy: Strategy, tokens_shape: tuple[int, ...]) -> Compiled:
    """Trace, lower and compile, and read the compiler's own account of memory, per device."""
    started = time.perf_counter()
    lowered = strategy.lower(tokens_shape)
    traced = time.perf_counter()
    compiled = lowered.compile(strategy.options or None)
    finished = time.perf_counter()
    sizes = compiled.memory_analysis()
    figures = {
        "trace_seconds": traced - started,
        "compile_seconds": finished - traced,
        "argument_bytes": sizes.argument_size_in_bytes,
        "output_bytes": sizes.output_size_in_bytes,
        "alias_bytes": sizes.alias_size_in_bytes,
        "temp_bytes": sizes.temp_size_in_bytes,
        "device_bytes": sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        - sizes.alias_size_in_bytes
        + sizes.temp_size_in_bytes,
        "peak_bytes": getattr(sizes, "peak_memory_in_bytes", None),
        "collectives": _collectives(compiled.as_text() or ""),
        "options": strategy.options,
    }
    return Compiled(strategy, compiled, figures)


def run_turn(compiled: Compiled, params: Any, batches: np.ndarray) -> dict[str, Any]:
    """Train from `params` for a step a batch; the first warms up and is not timed.

    Returns:
      Losses of all steps; seconds of those after the first; bytes that state and batches take on
      every device; the most that every device's allocator has given out since the process started.
    """
    before = _memory("bytes_in_use")
    tokens = [jax.device_put(batch, compiled.strategy.tokens) for batch in batches]
    state = compiled.strategy.start(params)
    losses, seconds = [], []
    for batch in tokens:
        jax.block_until_ready(state)
        started = time.perf_counter()
        state, loss = compiled.call(state, batch)
        losses.append(float(loss))
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - started)
    held = [after - old for after, old in zip(_memory("bytes_in_use"), before, strict=True)]
    return {
        "losses": losses,
        "seconds": seconds[1:],
        "state_bytes": held,
        "process_peak_bytes": _memory("peak_bytes_in_use"),
    }


def summary(
    turns: list[dict[str, Any]], devices: int, tokens: int, flops: float, peak: float
) -> dict[str, Any]:
    """Times over all turns, and the rates that follow.

    Args:
      turns: what `run_turn` returned.
      devices: that the strategy computes on.
      tokens: of a global batch.
      flops: of a step, as the model needs them.
      peak: operations a second of one device.
    """
    seconds = sorted(x for turn in turns for x in turn["seconds"])
    median = statistics.median(seconds)
    return {
        "turns": turns,
        "losses": turns[0]["losses"],
        "same_losses_every_turn": all(turn["losses"] == turns[0]["losses"] for turn in turns),
        "step_seconds": median,
        "fastest_seconds": seconds[0],
        "slowest_seconds": seconds[-1],
        "timed_steps": len(seconds),
        "tokens_per_second": tokens / median,
        "model_flops_utilisation": flops / (median * peak * devices),
    }


def loss_differences(figures: Mapping[str, dict[str, Any]]) -> dict[str, float]:
    """Per strategy, the largest relative difference of a loss from the first strategy's at the same
    step.
    """
    ran = {name: each["losses"] for name, each in figures.items() if "losses" in each}
    base = np.array(next(iter(ran.values()), []))
    return {
        name: float(np.max(np.abs(np.array(losses) - base) / np.abs(base)))
        for name, losses in ran.items()
    }


def _collectives(hlo: str) -> dict[str, int]:
    """Counts of each collective in the program."""
    found = COLLECTIVE.findall(hlo)
    return {kind: found.count(kind) for kind in sorted(set(found))}


def _memory(statistic: str) -> list[int]:
    """A statistic of every device's allocator; 0 if the device has none (a CPU)."""
    return [(device.memory_stats() or {}).get(statistic, 0) for device in jax.local_devices()]
