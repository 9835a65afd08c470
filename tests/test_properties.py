"""Random programs, cut anywhere: the stages compute what the program computes."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

from layerwise_jax.build import build_pipeline
from layerwise_jax.schedule.registry import SCHEDULES
from layerwise_jax.stage.cut import cut_stages, run_stage
from layerwise_jax.trace.layers import LayerSequence, trace_layers
from tests.models.random_programs import RandomProgram, programs
from tests.support.staging import compile_lightly

EXAMPLES = 2  # in a microbatch


def draw_boundaries(data: st.DataObject, num_layers: int, max_stages: int) -> list[int]:
    inner = (
        st.sets(st.integers(1, num_layers - 1), max_size=max_stages - 1)
        if num_layers > 1
        else st.just(set())
    )
    return [0, *sorted(data.draw(inner, label="cuts")), num_layers]


def rows_of(
    program: RandomProgram, inputs: Sequence[jax.Array], microbatch: int
) -> list[jax.Array]:
    rows = slice(microbatch * EXAMPLES, (microbatch + 1) * EXAMPLES)
    return [x if axis is None else x[rows] for x, axis in zip(inputs, program.in_axes, strict=True)]


def run_stages(
    layers: LayerSequence, boundaries: Sequence[int], params: Any, inputs: Sequence[jax.Array]
) -> Any:
    """The stages in order, each given its own weights, its own inputs and what has arrived, and
    nothing else.
    """
    program, leaves = layers.program, jax.tree.leaves(params)
    inputs_by_value = dict(zip(program.inputs, inputs, strict=True))
    outputs, arrived = {}, {}
    for stage in cut_stages(layers, boundaries):
        assert arrived.keys() == set(stage.receives)
        weights = {x: weight.of(leaves[weight.leaf]) for x, weight in stage.weights.items()}
        known = arrived | weights | {x: inputs_by_value[x] for x in stage.inputs}
        results = run_stage(program, stage, known)
        arrived = dict(zip(stage.sends, results, strict=False))
        outputs |= dict(zip(stage.outputs, results[len(stage.sends) :], strict=True))
    assert not arrived
    return [outputs[position] for position in sorted(outputs)]


def check_stages_equal_the_program(program: RandomProgram, data: st.DataObject) -> None:
    params, count = program.params(), data.draw(st.integers(1, 2), label="microbatches")
    inputs = program.inputs(EXAMPLES * count)
    layers = trace_layers(program.fn, params, *rows_of(program, inputs, 0))
    boundaries = draw_boundaries(data, len(layers), 6)
    for microbatch in range(count):
        rows = rows_of(program, inputs, microbatch)
        with jax.disable_jit():  # Python runs the function operation by operation: no jaxpr, no cut
            wanted = program.fn(params, *rows)
        for x, y in zip(run_stages(layers, boundaries, params, rows), wanted, strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(bits(x), bits(y))


def bits(x: jax.Array) -> np.ndarray:
    return np.asarray(x).view(np.uint16 if x.dtype == jnp.bfloat16 else np.uint32)


@settings(max_examples=200)
@given(programs(), st.data())
def test_stages_in_order_equal_the_program_bitwise(
    program: RandomProgram, data: st.DataObject
) -> None:
    check_stages_equal_the_program(program, data)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=5000)
@given(programs(max_layers=16), st.data())
def test_stages_of_many_programs_equal_them_bitwise(
    program: RandomProgram, data: st.DataObject
) -> None:
    check_stages_equal_the_program(program, data)


# Schedules that deal stages round-robin, which the loop runs.
LOOP_SCHEDULES = [name for name, family in SCHEDULES.items() if family.stages_per_device != 2]


def draw_way(
    data: st.DataObject, num_stages: int, stage_mesh: Callable[..., Mesh]
) -> tuple[Mesh, dict[str, Any]]:
    """Devices for so many stages, and a way to train on them; bubbles compute on NaN unless they
    are skipped.
    """
    schedule = data.draw(st.sampled_from(LOOP_SCHEDULES), label="schedule")
    per_device = SCHEDULES[schedule].stages_per_device
    chunks = [c for c in range(1, num_stages + 1) if num_stages % c == 0 and per_device is None]
    num_devices = num_stages // data.draw(st.sampled_from(chunks or [1]), label="stages a device")
    remat = data.draw(st.sampled_from(["stage", None]), label="remat")
    skips = data.draw(st.booleans(), label="skips bubbles")
    options = {
        "schedule": schedule,
        "remat": remat,
        "skip_bubbles": skips,
        "bubble_fill": float("nan"),
    }
    return stage_mesh(num_devices), options


@settings(
    max_examples=12, phases=[Phase.explicit, Phase.reuse, Phase.generate]
)  # to shrink takes minutes
@given(programs(min_layers=3, max_layers=7), st.data())
def test_a_compiled_pipeline_has_the_values_and_gradients_of_the_program(
    stage_mesh: Callable[..., Mesh], program: RandomProgram, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, 4), label="microbatches")
    with jax.enable_x64(True):  # so that what rounding does is far below what an error would
        params, inputs = program.params(np.float64), program.inputs(EXAMPLES * count, np.float64)
        layers = trace_layers(program.loss_fn, params, *rows_of(program, inputs, 0))
        boundaries = draw_boundaries(data, len(layers), 4)
        mesh, options = draw_way(data, len(boundaries) - 1, stage_mesh)
        pipeline = build_pipeline(
            layers, boundaries, mesh, count, in_axes=program.in_axes, reduce="mean", **options
        )
        value, grads = compile_lightly(pipeline.value_and_grad)(pipeline.place(params), *inputs)
        wanted = compile_lightly(jax.value_and_grad(program.loss_fn, has_aux=True))(params, *inputs)
        tolerance = 1e-4 if program.has_casts else 1e-9
        jax.tree.map(
            lambda x, y: assert_close(x, y, tolerance), (value, pipeline.gather(grads)), wanted
        )


def assert_close(x: jax.Array, y: jax.Array, tolerance: float) -> None:
    """Equal relative to the largest entry of the leaf."""
    assert (x.shape, x.dtype) == (y.shape, y.dtype)
    wanted = np.asarray(y, np.float64)
    np.testing.assert_allclose(
        np.asarray(x, np.float64), wanted, rtol=0, atol=tolerance * np.abs(wanted).max() + 1e-12
    )
