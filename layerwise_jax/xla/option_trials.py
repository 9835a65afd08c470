"""Pipelines compiled with XLA options, given or chosen for the smallest working set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from layerwise_jax import processes
from layerwise_jax.mesh import STAGE
from layerwise_jax.xla.aot import CompiledProgram, compile_for
from layerwise_jax.xla.options import (
    NOTHING_PINS_L2,
    Options,
    OptionsReport,
    check_options,
    choose_options,
    hazards,
)

TIMED_RUNS = 5


@dataclass(frozen=True, eq=False)
class CompiledPipeline:
    """Pipeline compiled with options; it is called like the pipeline.

    Attributes:
      call: the function, jitted with the options.
      options: options of this program only.
      report: trials of "auto", or None.
      warnings: warnings about options that are known to slow or break the loop.
    """

    call: Callable[..., Any]
    options: Options
    report: OptionsReport | None
    warnings: tuple[str, ...]

    def __call__(self, staged: Any, *inputs: Any) -> Any:
        return self.call(staged, *inputs)

    def __str__(self) -> str:
        return (
            str(self.report)
            if self.report
            else "\n".join([f"options: {dict(self.options)}", NOTHING_PINS_L2])
        )


def compile_pipeline(
    pipeline: Callable[..., Any],
    mesh: Mesh,
    staged: Any,
    inputs: tuple[Any, ...],
    options: Literal["auto"] | Mapping[str, Any] | None,
) -> CompiledPipeline:
    """Compile a pipeline for its mesh.

    Args:
      pipeline: pipeline, as a function of placed parameters and inputs.
      mesh: mesh of the pipeline.
      staged: placed parameters, or their shapes.
      inputs: the full batch, or its shapes.
      options: "auto" to try the choices of `xla.options` and keep those that shrink workspace and
        peak memory and, on a GPU, are not slower; a mapping of options; None for the defaults.

    Raises:
      OptionError: the compiler does not know an option, or refuses its value.
    """
    if isinstance(options, str) and options != "auto":
        raise ValueError(
            f"options must be 'auto', a mapping of XLA options to values, or None, got {options!r}."
        )
    shapes = _shapes(mesh, staged, inputs)

    def compile_with(options: Options) -> CompiledProgram:
        return compile_for(None, pipeline, shapes, weights=[0], options=options)

    report = None
    if options == "auto":
        arrays = (staged, *inputs)
        report = choose_options(
            compile_with, run_seconds=_timer(pipeline, arrays) if _can_run(arrays) else None
        )
        chosen: Options = report.options
    else:
        chosen = dict(options or {})
        check_options(chosen, lambda one: jax.jit(lambda x: x + 1).lower(0.0).compile(dict(one)))
    call = jax.jit(pipeline, compiler_options=dict(chosen) or None)
    return CompiledPipeline(call, chosen, report, hazards(chosen))


def _shapes(mesh: Mesh, staged: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Types and shardings of the arguments; inputs are replicated."""
    everywhere = NamedSharding(mesh, PartitionSpec())

    def shape(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        aval = jax.typeof(x) if not isinstance(x, jax.ShapeDtypeStruct) else x
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding)

    placed = {
        name: shape(x, NamedSharding(mesh, PartitionSpec(STAGE))) for name, x in staged.items()
    }
    return placed, *jax.tree.map(lambda x: shape(x, everywhere), inputs)


def _can_run(arrays: Any) -> bool:
    """True on a GPU with arrays to run on. Times of a shared CPU are meaningless."""
    return jax.default_backend() == "gpu" and all(
        isinstance(x, jax.Array) for x in jax.tree.leaves(arrays)
    )


def _timer(
    pipeline: Callable[..., Any], arrays: tuple[Any, ...]
) -> Callable[[CompiledProgram], float]:
    """Function that times the fastest of a few runs with a compiled program's options."""

    def seconds(program: CompiledProgram) -> float:
        call = jax.jit(pipeline, compiler_options=dict(program.options) or None)
        jax.block_until_ready(call(*arrays))
        times = []
        for _ in range(TIMED_RUNS):
            times.append(processes.seconds_of(lambda: jax.block_until_ready(call(*arrays))))
        return min(times)

    return seconds
