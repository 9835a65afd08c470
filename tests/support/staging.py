"""Stages a case of the zoo, and compares its results."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import keystr, tree_leaves_with_path, tree_map_with_path

from layerwise_jax.build import build_pipeline
from layerwise_jax.pipeline import Pipeline
from layerwise_jax.trace.layers import LayerSequence, trace_layers
from tests.models.zoo import BATCH, Case

STEPS_TOLERANCE = 1e-9
"""Of several training steps in float64: roundings of 1e-16, amplified up to a million times."""
ZERO_SHARE = 1e-2
"""Part of the largest entry of all leaves below which a leaf counts as zero but for rounding."""


@dataclass(frozen=True)
class Run:
    """Results of a case for its whole batch."""

    loss: Any
    outputs: Any
    """What `fn` returns, state left out."""
    gradients: Any
    params: Any
    """The parameters afterwards, with the new state if the case has any."""


def compile_lightly(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`jit` in half the time, since speed is not what is tested."""
    return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0}, **options)


def in_float64(tree: Any) -> Any:
    """The tree with its floating-point arrays as float64; needs the fixture `float64`."""

    def widen(x: Any) -> Any:
        return x.astype(np.float64) if jax.numpy.issubdtype(x.dtype, np.floating) else x

    return jax.tree.map(widen, tree)


def widened(case: Case) -> Case:
    """The case with parameters and inputs in float64."""
    return replace(case, params=in_float64(case.params), inputs=in_float64(case.inputs))


def even_boundaries(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Stages of as equal numbers of layers as there can be."""
    return tuple(round(s * num_layers / num_stages) for s in range(num_stages + 1))


def uneven_boundaries(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Stages of one layer each, but for the middle one, which has all of the others."""
    middle, surplus = num_stages // 2, num_layers - num_stages
    return tuple(s + (surplus if s > middle else 0) for s in range(num_stages + 1))


def trace_case(case: Case, fn: Callable[..., Any], parts: int) -> LayerSequence:
    """The layers of `fn`, traced on one of so many parts of the case's batch."""
    return trace_layers(fn, case.params, *case.inputs_of(slice(0, BATCH // parts)))


def stage_case(
    case: Case,
    fn: Callable[..., Any],
    mesh: Mesh,
    num_microbatches: int,
    cut: Callable[[int, int], Sequence[int]] = even_boundaries,
    num_stages: int | None = None,
    **options: Any,
) -> Pipeline:
    """The pipeline of `fn` over the mesh, its stages (None: one a device) between the boundaries
    that `cut` gives.
    """
    layers = trace_case(case, fn, num_microbatches * mesh.shape.get("data", 1))
    options = {"in_axes": case.in_axes or 0, "reduce": case.reduce, **options}
    boundaries = cut(len(layers), num_stages or mesh.shape["stage"])
    return build_pipeline(layers, boundaries, mesh, num_microbatches, **options)


def run_unstaged(case: Case, num_microbatches: int = 1) -> Run:
    """The case by JAX alone, one microbatch after the other, as gradient accumulation goes about
    it.

    Each microbatch gets the state that the one before it left.
    """
    step = compile_lightly(jax.value_and_grad(case.loss_and_outputs, has_aux=True))
    rows, params, runs = BATCH // num_microbatches, case.params, []
    for start in range(0, BATCH, rows):
        (loss, outputs), gradients = step(params, *case.inputs_of(slice(start, start + rows)))
        if case.state:
            params, outputs = with_state(params, case.state(outputs)), without_state(case, outputs)
        runs.append(jax.device_get((loss, outputs, gradients)))
    losses, outputs, gradients = zip(*runs, strict=True)
    mean = jax.tree.map(lambda *parts: np.mean(np.stack(parts), axis=0), *gradients)
    return Run(
        np.mean(losses), jax.tree.map(lambda *parts: np.concatenate(parts), *outputs), mean, params
    )


def stage_step(
    case: Case,
    mesh: Mesh,
    num_microbatches: int,
    cut: Callable[[int, int], Sequence[int]] = even_boundaries,
    **options: Any,
) -> Pipeline:
    """The pipeline of the case's `loss_and_outputs`, with its state if it has any."""
    pick = case.state
    state = (
        {"state": lambda step: pick(step[1]), "batch_statistics": "per_microbatch"} if pick else {}
    )
    return stage_case(case, case.loss_and_outputs, mesh, num_microbatches, cut, **state, **options)


def run_staged(case: Case, pipeline: Pipeline) -> Run:
    """The case by the pipeline that `stage_step` makes, everything put together again."""
    staged = pipeline.place(case.params)
    value, gradients = compile_lightly(pipeline.value_and_grad)(staged, *case.inputs)
    (loss, outputs), staged = value if case.state else (value, staged)
    return Run(loss, outputs, pipeline.gather(gradients), pipeline.gather(staged))


def with_state(params: Any, state: Any) -> Any:
    """The parameters with these new values at the paths that `state` has."""
    new = {keystr(path): leaf for path, leaf in tree_leaves_with_path(state)}
    return tree_map_with_path(lambda path, leaf: new.get(keystr(path), leaf), params)


def without_state(case: Case, outputs: Any) -> Any:
    """The outputs with None for every leaf of state."""
    assert case.state is not None
    leaves, tree = jax.tree.flatten(outputs)
    positions = set(jax.tree.leaves(case.state(jax.tree.unflatten(tree, list(range(len(leaves)))))))
    return jax.tree.unflatten(
        tree, [None if j in positions else leaf for j, leaf in enumerate(leaves)]
    )


def assert_trees_close(got: Any, want: Any, tolerance: float) -> None:
    """Two trees have the same paths, types, and entries up to `tolerance` times the largest entry
    of their leaf.

    A leaf may be zero but for rounding (softmax does not see the bias of attention's keys), so no
    leaf is held to less than `ZERO_SHARE` of what the tree's largest entry is held to.
    """
    wanted = tree_leaves_with_path(jax.device_get(want))
    come = tree_leaves_with_path(jax.device_get(got))
    assert [path for path, _ in come] == [path for path, _ in wanted]
    floor = ZERO_SHARE * max(_largest(leaf) for _, leaf in wanted)
    for (path, x), (_, y) in zip(come, wanted, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype), keystr(path)
        off, allowed = _largest(_difference(x, y)), tolerance * max(_largest(y), floor)
        assert off <= allowed, f"{keystr(path)} is off by {off:.1e}; {allowed:.1e} is allowed"


def _difference(x: Any, y: Any) -> np.ndarray:
    if np.issubdtype(y.dtype, np.integer) or y.dtype in (np.bool_, jax.dtypes.float0):
        return np.asarray(0.0 if np.array_equal(x, y) else np.inf)
    return np.asarray(x, np.float64) - np.asarray(y, np.float64)


def _largest(leaf: Any) -> float:
    """The largest absolute entry; NaN if there is one, which no comparison lets pass."""
    if jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating) and leaf.size:
        return float(np.max(np.abs(np.asarray(leaf, np.float64))))
    return 0.0
