"""Runs a function on parts of its batch and recombines the results, as a pipeline does."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layerwise_jax.batch.analysis import BatchAnalysis, BatchOptions, OutputRole, analyze_batching
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
        return analyze_batching(self.trace(), self.axes, self.parts, BatchOptions(**options))

    def run_whole(self) -> list[Any]:
        """The output leaves of the unsplit function."""
        return jax.device_get(jax.tree.leaves(compile_lightly(self.fn)(self.params, *self.inputs)))

    def run_in_parts(self, batching: BatchAnalysis) -> list[Any]:
        """The output leaves combined from those of the parts, by their roles."""

        def run(index: Any, inputs: Sequence[Any]) -> list[Any]:
            return self._run_part(batching, self.params, index, inputs)

        jitted = compile_lightly(run)
        inputs = self._inputs_of_parts(batching)
        results = [jax.device_get(jitted(index, inputs[index])) for index in range(self.parts)]
        made = zip(*results, strict=True)
        return [combine(role, x) for role, x in zip(batching.outputs, made, strict=True)]

    def gradients_in_parts(self, batching: BatchAnalysis) -> Any:
        """The gradients of the first output: those of the parts, each seeded with its share."""
        seed = 1.0 if batching.outputs[0].combine == "sum" else 1 / self.parts

        def pull(index: Any, inputs: Sequence[Any]) -> Any:
            def loss(params: Any) -> Any:
                return self._run_part(batching, params, index, inputs)[0]

            value, vjp = jax.vjp(loss, self.params)
            return vjp(jnp.full_like(value, seed))[0]

        jitted = compile_lightly(pull)
        inputs = self._inputs_of_parts(batching)
        shares = [jitted(index, inputs[index]) for index in range(self.parts)]
        return jax.tree.map(lambda *x: np.sum(jax.device_get(x), axis=0), *shares)

    def _inputs_of_parts(self, batching: BatchAnalysis) -> list[list[Any]]:
        """For every part, the inputs of the program."""
        whole = batching.inputs(jax.tree.leaves(self.inputs))
        return [
            [
                x if axis is None else jnp.split(x, self.parts)[index]
                for x, axis in zip(whole, batching.in_axes, strict=True)
            ]
            for index in range(self.parts)
        ]

    def _run_part(
        self, batching: BatchAnalysis, params: Any, index: Any, inputs: Sequence[Any]
    ) -> list[Any]:
        program = batching.program
        leaves = jax.tree.leaves(params)
        env = dict(program.constants)
        env.update({value: w.of(leaves[w.leaf]) for value, w in program.weights.items()})
        env.update(zip(program.inputs, inputs, strict=True))
        return evaluate(program.ops, env, program.outputs, BatchSlice(index))


def combine(role: OutputRole, parts: Sequence[Any]) -> Any:
    if role.kind == "rows":
        return np.concatenate(parts)
    if role.combine is not None:
        return getattr(np, role.combine)(parts, axis=0)
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
