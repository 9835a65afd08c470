"""Pipelines by executor `host`, for tests."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from layerwise_jax.pipeline import Pipeline
from tests.support.staging import Run
from tests.support.zoo_case import Case

LIGHT = {"xla_backend_optimization_level": 0}
"""Compile in half the time, since speed is not what is tested."""


def on_host(pipeline: Pipeline, **options: Any) -> Pipeline:
    """The same pipeline with executor `host`, and other options if any are given."""
    options = {"executor": "host", "xla_options": LIGHT, **options}
    return replace(pipeline, options=pipeline.options.updated(**options))


def run_on_host(
    case: Case, pipeline: Pipeline, call: Callable[[Callable[[], Any]], Any] = lambda run: run()
) -> Run:
    """The case by a pipeline that `stage_step` makes, everything put together again."""
    staged = pipeline.place(case.params)
    value, gradients = call(lambda: pipeline.value_and_grad(staged, *case.inputs))
    (loss, outputs), staged = value if case.state else (value, staged)
    return Run(loss, outputs, pipeline.gather(gradients), pipeline.gather(staged))
