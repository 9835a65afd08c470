"""How the tests run a function on parts of its batch and put the results together, as a pipeline
does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layerwise_jax.batch.analysis import BatchAnalysis, analyze_batching
from layerwise_jax.trace.layers import LayerSequence, trace_layers
from layerwise_jax.trace.program import BatchSlice, evaluate
from tests.support.staging import compile_lightly

Axes = tuple[int | None, ...]


@dataclass(frozen=True)
class Split:
    """A function of (params, *inputs), to be run on so many parts of its batch.

    Attributes:
      axes: for every leaf of the inputs, 0 if it is split, None if every part gets it whole.
    """

    fn: Callable[..., Any]
    params: Any
    inputs: tuple[Any, ...]
    axes: Axes
    parts: int

    def part(self, index: int) -> tuple[Any, ...]:
        leaves, tree = jax.tree.flatten(self.inputs)
        rows = [
            len(x) // self.parts if axis == 0 else 0
            for x, axis in zip(leaves, self.axes, strict=True)
        ]
        return jax.tree.unflatten(
            tree,
            [x[index * n : (index + 1) * n] if n else x for x, n in zip(leaves, rows, strict=True)],
        )

    def trace(self) -> LayerSequence:
        return trace_layers(self.fn, self.params, *self.part(0))

    def analyse(self, **options: Any) -> BatchAnalysis:
        return analyze_batching(self.trace(), self.axes, self.parts, **options)

    def run_whole(self) -> list[Any]:
        """The output leaves of the unsplit function."""
        return jax.device_get(jax.tree.leaves(compile_lightly(self.fn)(self.params, *self.inputs)))

    def run_in_parts(self, batching: BatchAnalysis, reduce: str | None) -> list[Any]:
        """The output leaves put together from those of the parts, by their roles."""

        def run(index: Any, *inputs: Any) -> list[Any]:
            return self._run_part(batching, self.params, index, inputs)

        jitted = compile_lightly(run)
        results = [jax.device_get(jitted(index, *self.part(index))) for index in range(self.parts)]
        made = zip(*results, strict=True)
        return [
            combine(role.kind, x, reduce) for role, x in zip(batching.outputs, made, strict=True)
        ]

    def gradients_in_parts(self, batching: BatchAnalysis, reduce: str | None) -> Any:
        """The gradients of the first output: those of the parts, each seeded with its share."""
        seed = 1.0 if reduce == "sum" else 1 / self.parts

        def pull(index: Any, *inputs: Any) -> Any:
            def loss(params: Any) -> Any:
                return self._run_part(batching, params, index, inputs)[0]

            value, vjp = jax.vjp(loss, self.params)
            return vjp(jnp.full_like(value, seed))[0]

        jitted = compile_lightly(pull)
        shares = [jitted(index, *self.part(index)) for index in range(self.parts)]
        return jax.tree.map(lambda *x: np.sum(jax.device_get(x), axis=0), *shares)

    def _run_part(
        self, batching: BatchAnalysis, params: Any, index: Any, inputs: tuple[Any, ...]
    ) -> list[Any]:
        program = batching.program
        leaves = jax.tree.leaves(params)
        env = dict(program.constants)
        env.update({value: w.of(leaves[w.leaf]) for value, w in program.weights.items()})
        env.update(zip(program.inputs, jax.tree.leaves(inputs), strict=True))
        return evaluate(program.ops, env, program.outputs, BatchSlice(index))


def combine(kind: str, parts: Sequence[Any], reduce: str | None) -> Any:
    if kind == "rows":
        return np.concatenate(parts)
    if kind == "reduced":
        return np.mean(parts, axis=0) if reduce == "mean" else np.sum(parts, axis=0)
    for part in parts:
        np.testing.assert_array_equal(part, parts[0])
    return parts[0]


def assert_equal(came: Sequence[Any], wanted: Sequence[Any], tolerance: float) -> None:
    """Floats up to a part of the largest entry, everything else bit by bit."""
    for x, y in zip(came, wanted, strict=True):
        assert np.shape(x) == np.shape(y)
        if np.issubdtype(y.dtype, np.inexact):
            np.testing.assert_allclose(
                x, y, rtol=0, atol=tolerance * max(1.0, np.max(np.abs(y), initial=0))
            )
        else:
            np.testing.assert_array_equal(x, y)
