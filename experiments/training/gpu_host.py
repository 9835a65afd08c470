"""Executor `host`: every stage as separate programs, driven by one thread per device."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jax.sharding import Sharding as ArraySharding

import layerwise_jax as lw
from experiments.training.gpu_measure import Compiled
from experiments.training.gpu_model import Model
from experiments.training.gpu_staged import stage_model
from experiments.training.gpu_strategies import OPTIMIZER

Remat = Literal["stage", "cheap"]
KEPT = {None: "all residuals", "cheap": "products and attention kept", "stage": "recomputed"}


@dataclass(frozen=True, eq=False)
class HostStrategy:
    """Executor `host` with the interface that turns are taken by.

    Attributes:
      name, how, devices, tokens, options, figures: as in `Strategy`.
      pipeline: the pipeline.
    """

    name: str
    how: str
    devices: int
    tokens: ArraySharding
    pipeline: Any
    options: dict[str, Any]
    figures: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def step(self) -> Any:
        return self.pipeline.train_step(OPTIMIZER)

    def start(self, params: Any) -> tuple[Any, Any]:
        """Placed parameters, and moments of zero."""
        staged = self.pipeline.place(params)
        return staged, self.step.init(staged)

    def timeline(self, params: Any, tokens: jax.Array) -> str:
        """Every stage program's seconds, one at a time, and what the schedule makes of them."""
        staged = self.pipeline.place(params)
        return str(self.pipeline.host_executor.timeline(staged, [tokens]))

    def call(self, state: tuple[Any, Any], tokens: jax.Array) -> tuple[tuple[Any, Any], jax.Array]:
        """One step of AdamW: (state, loss)."""
        staged, moments, loss = self.step(*state, tokens)
        return (staged, moments), loss


def host_driven(
    model: Model,
    devices: Sequence[Any],
    examples: int,
    microbatches: int,
    remat: Remat | None,
    options: dict[str, Any],
    deferred: int = 0,
) -> Compiled:
    """The strategy, compiled: all programs of its stages; the optimizer's with the first step.

    `deferred` weight gradients of every stage but the first wait for the end of the step, where
    those stages are idle while the first one finishes.
    """
    stages = len(devices)
    schedule = lw.schedule.one_f_one_b(stages, microbatches, paired=True)
    if deferred:
        schedule = lw.schedule.defer(
            schedule, [min(deferred * s, microbatches) for s in range(stages)]
        )
    staged = stage_model(
        model,
        devices,
        examples,
        microbatches,
        remat=remat,
        schedule=schedule,
        executor="host",
        xla_options=options,
    )
    everywhere = NamedSharding(staged.pipeline.mesh, PartitionSpec())
    how = f"{staged.how}, programs per stage driven by host threads, {KEPT[remat]}"
    how += f", {deferred} weight gradients deferred a stage" if deferred else ""
    suffix = f", {deferred} deferred" if deferred else ""
    strategy = HostStrategy(
        name=f"layer-wise (host), M = {microbatches}, {remat or 'all'}{suffix}",
        how=how,
        devices=len(devices),
        tokens=everywhere,
        pipeline=staged.pipeline,
        options=options,
        figures=staged.figures,
    )
    return Compiled(strategy, strategy.call, _compile(strategy))


def _compile(strategy: HostStrategy) -> dict[str, Any]:
    """Compile all stage programs; figures of memory are those of the fullest device."""
    executor, started = strategy.pipeline.host_executor, time.perf_counter()
    executor.compile(trains=True)
    seconds = time.perf_counter() - started
    slots = strategy.pipeline.placement.of_column
    # AdamW: two moments of a weight's type, so that parameters and state are three times that.
    state = [3 * sum(slot.aval.size * slot.aval.dtype.itemsize for slot in c.slots) for c in slots]
    memory = executor.memory()
    peaks = [each.peak + 2 * each.weights for each in memory]
    fullest = max(range(len(peaks)), key=peaks.__getitem__)
    return {
        "trace_seconds": 0.0,
        "compile_seconds": seconds,
        "argument_bytes": state[fullest],
        "temp_bytes": peaks[fullest] - state[fullest],
        "device_bytes": peaks[fullest],
        "programs": len(executor.library.programs),
        "distinct_programs": executor.library.num_distinct,
        "memory_by_device": [str(each) for each in memory],
        "collectives": {},
        "options": strategy.options,
    }
