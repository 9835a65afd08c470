"""Random (program, cut, schedule) triples: a compiled pipeline equals the unstaged program.

float64 must agree to 1e-12 of the largest entry of a leaf. float32 must agree to 8 times the
unstaged program's own change under another order of summation.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from layerwise_jax.build import build_pipeline
from layerwise_jax.schedule.registry import SCHEDULES
from layerwise_jax.trace.layers import trace_layers
from tests.models.random_programs import RandomProgram, random_program
from tests.support.staging import compile_lightly
from tests.support.summation import change_by_order, largest_difference

EXAMPLES = 2  # of a microbatch
FLOAT64_TOLERANCE = 1e-12
ORDER_FACTOR = 8
MAX_LAYERS = 4
# Rounding decides their results, so that two orders of summation differ by whole steps.
DISCRETE = ("cast", "integers", "lookup")


def check(seed: int, index: int) -> str:
    """Value and gradients of a random pipeline; even cases are float64, odd ones float32."""
    rng = np.random.default_rng([seed, index])
    is_double = index % 2 == 0
    program = random_program(rng, MAX_LAYERS, without=DISCRETE)
    count = int(rng.integers(1, 4))
    with jax.enable_x64(is_double):
        _check(program, count, np.float64 if is_double else np.float32, rng)
    return "equal in float64" if is_double else "equal in float32"


def _check(program: RandomProgram, count: int, dtype: Any, rng: np.random.Generator) -> None:
    params = program.params(dtype)
    inputs = program.inputs(EXAMPLES * count, dtype)
    rows = [
        x if axis is None else x[:EXAMPLES] for x, axis in zip(inputs, program.in_axes, strict=True)
    ]
    layers = trace_layers(program.loss_fn, params, *rows)
    pipeline = build_pipeline(
        layers, in_axes=program.in_axes, reduce="mean", **_draw_way(rng, len(layers), count)
    )
    step = compile_lightly(pipeline.value_and_grad)
    (value, outputs), grads = step(pipeline.place(params), *inputs)
    got = (value, outputs, pipeline.gather(grads))
    unstaged = compile_lightly(jax.value_and_grad(program.loss_fn, has_aux=True))

    def run(order: np.ndarray) -> Any:
        """The unstaged program with its examples in another order, its outputs put back."""
        moved = [
            x if axis is None else x[order] for x, axis in zip(inputs, program.in_axes, strict=True)
        ]
        (value, outputs), grads = unstaged(params, *moved)
        back = np.argsort(order)
        return value, [x[back] for x in outputs], grads

    expected = run(np.arange(EXAMPLES * count))
    tolerance = FLOAT64_TOLERANCE
    if dtype == np.float32:
        tolerance = ORDER_FACTOR * change_by_order(run, expected, EXAMPLES * count, jnp.float32)
    difference = largest_difference(got, expected)
    assert difference <= tolerance, f"{difference:.2e} of {tolerance:.2e}: {program}"


def _draw_way(rng: np.random.Generator, num_layers: int, count: int) -> dict[str, Any]:
    """Boundaries, mesh and schedule of a pipeline of 1 to 4 stages.

    V-shaped schedules, of two stages a device, are not run by the loop.
    """
    num_cuts = int(rng.integers(0, min(num_layers, 4)))
    cuts = sorted((1 + rng.permutation(num_layers - 1)[:num_cuts]).tolist())
    num_stages = num_cuts + 1
    ways = [
        (name, chunks)
        for name, family in SCHEDULES.items()
        for chunks in range(1, num_stages + 1)
        if num_stages % chunks == 0
        and family.stages_per_device in (None, chunks)
        and family.stages_per_device != 2
    ]
    schedule, chunks = ways[rng.integers(len(ways))]
    mesh = Mesh(
        np.array(jax.devices()[: num_stages // chunks]), ("stage",), axis_types=(AxisType.Auto,)
    )
    return {
        "partition": [0, *cuts, num_layers],
        "mesh": mesh,
        "num_microbatches": count,
        "schedule": schedule,
        "remat": [None, "stage"][rng.integers(2)],
        "skip_bubbles": bool(rng.integers(2)),
        "bubble_fill": float("nan"),
    }
