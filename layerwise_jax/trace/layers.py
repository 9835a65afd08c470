"""Layer sequence of a traced function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import jax
import numpy as np

from layerwise_jax import _jax
from layerwise_jax.trace.flatten import flatten
from layerwise_jax.trace.flatten_policy import FOR_STAGES
from layerwise_jax.trace.layer_search import Layer, find_layers
from layerwise_jax.trace.modules import captured_names, modules_of, path_names
from layerwise_jax.trace.mutation import with_mutations
from layerwise_jax.trace.pinned import live_bytes
from layerwise_jax.trace.program import Program, evaluate


@dataclass(frozen=True)
class Signature:
    """Trees and types of a traced function's parameters, inputs and outputs.

    Attributes:
      params_tree: tree of the parameters.
      params_avals: type of every leaf of the parameters.
      params_paths: key path of every leaf of the parameters.
      inputs_tree: tree of the inputs.
      inputs_avals: type of every leaf of the inputs.
      outputs_tree: tree of what the function returns.
      outputs_avals: type of every leaf of the outputs, and then of every mutated leaf.
      mutated: the leaves of the parameters that the function gives new values (nnx Variables).
      captured: arrays that the function closes over and that are placed as frozen weights, by leaf.
      captured_names: the name of each.
    """

    params_tree: Any
    params_avals: tuple[Any, ...]
    params_paths: tuple[Any, ...]
    inputs_tree: Any
    inputs_avals: tuple[Any, ...]
    outputs_tree: Any
    outputs_avals: tuple[Any, ...]
    mutated: tuple[int, ...] = ()
    captured: Mapping[int, Any] = field(default_factory=dict)
    captured_names: Mapping[int, str] = field(default_factory=dict)

    def outputs(self, leaves: Sequence[Any]) -> Any:
        """The function's result, rebuilt from the output leaves; mutated leaves are dropped."""
        return jax.tree.unflatten(self.outputs_tree, leaves[: self.outputs_tree.num_leaves])

    def path(self, leaf: int) -> tuple[Any, ...]:
        """Key path of a leaf of the parameters, or the name of a captured array as one."""
        if leaf in self.captured_names:
            return (jax.tree_util.GetAttrKey(self.captured_names[leaf]),)
        return self.params_paths[leaf]

    @property
    def params_names(self) -> tuple[str, ...]:
        """Path of every parameter leaf as `jax.tree_util.keystr` prints it."""
        return tuple(jax.tree_util.keystr(path) for path in self.params_paths)


@dataclass(frozen=True, eq=False)
class LayerSequence:
    """Traced function as an ordered sequence of layers.

    Calling it runs the traced operations one by one and returns what `fn` returns.

    Attributes:
      fn: the traced function, `fn(params, *inputs)`.
      program: its flat program at the traced shapes.
      layers: contiguous runs of pinned operations; each pinned operation is in one layer.
      signature: trees and types of parameters, inputs and outputs.
    """

    fn: Callable[..., Any]
    program: Program
    layers: tuple[Layer, ...]
    signature: Signature

    def __call__(self, params: Any, *inputs: Any) -> Any:
        """`fn(params, *inputs)`, operation by operation.

        Raises:
          ValueError: parameters or inputs have another tree than the traced ones.
        """
        program = self.program
        given = jax.tree.structure(params), jax.tree.structure(inputs)
        traced = self.signature.params_tree, self.signature.inputs_tree
        if given != traced:
            raise ValueError(
                f"params and inputs must have the traced trees {traced[0]} and {traced[1]}, got "
                f"{given[0]} and {given[1]}. Pass what trace_layers was given."
            )
        leaves = jax.tree.leaves(params)
        arrays = {**dict(enumerate(leaves)), **program.captured}
        env = dict(program.constants)
        env.update({x: weight.of(arrays[weight.leaf]) for x, weight in program.weights.items()})
        env.update(zip(program.inputs, jax.tree.leaves(inputs), strict=True))
        return self.signature.outputs(evaluate(program.ops, env, program.outputs))

    def with_program(self, program: Program) -> LayerSequence:
        """These layers over a program with the same operations at the same positions."""
        assert len(program.ops) == len(self.program.ops)
        return replace(self, program=program)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(layer.name for layer in self.layers)

    @cached_property
    def boundary_bytes(self) -> tuple[int, ...]:
        """Bytes sent if the function is cut at each of the n + 1 boundaries; 0 at both ends."""
        widths = live_bytes(self.program, [i for layer in self.layers for i in layer.pinned])
        ends = np.cumsum([0] + [len(layer.pinned) for layer in self.layers])
        return tuple(widths[end] for end in ends)

    def __str__(self) -> str:
        width = max(len(name) for name in self.names)
        rows = [
            f"{name:{width}}  {len(layer.pinned):4} operations  {cut:>12,} bytes out"
            for name, layer, cut in zip(
                self.names, self.layers, self.boundary_bytes[1:], strict=True
            )
        ]
        return "\n".join(rows)


@_jax.no_context_mesh()
def trace_layers(fn: Callable[..., Any], params: Any, *inputs: Any) -> LayerSequence:
    """Trace `fn(params, *inputs)` and find its layers.

    Args:
      fn: JAX function of a tree of parameters and of inputs, such as a Flax model's `apply`.
      params: parameters as arrays or `jax.ShapeDtypeStruct`; nothing is computed.
      *inputs: inputs of one microbatch, as arrays or `jax.ShapeDtypeStruct`.

    Raises:
      ValueError: no operation reads both a parameter and an input, the function returns nothing, or
        it closes over a traced array.
    """
    paths, leaves, params_tree = _jax.key_paths(params)
    input_leaves, inputs_tree = jax.tree.flatten(inputs)
    mutating = with_mutations(fn, params, inputs)
    types = jax.tree.map(_without_mesh, (params, *inputs))
    jaxpr, outputs = jax.make_jaxpr(mutating or fn, return_shape=True)(*types)
    outputs, mutated = (outputs, {}) if mutating is None else outputs
    program = flatten(jaxpr, len(leaves), FOR_STAGES)
    output_leaves, outputs_tree = jax.tree.flatten(outputs)
    signature = Signature(
        params_tree=params_tree,
        params_avals=tuple(var.aval for var in jaxpr.invars[: len(leaves)]),
        params_paths=tuple(paths),
        inputs_tree=inputs_tree,
        inputs_avals=tuple(var.aval for var in jaxpr.invars[len(leaves) :]),
        outputs_tree=outputs_tree,
        outputs_avals=(*output_leaves, *(mutated[leaf] for leaf in sorted(mutated))),
        mutated=tuple(sorted(mutated)),
        captured=program.captured,
        captured_names=captured_names(fn, program.captured),
    )
    assert len(input_leaves) == len(signature.inputs_avals)
    layers = find_layers(program, modules_of([path_names(path) for path in paths]))
    if not layers or not outputs_tree.num_leaves:
        raise ValueError(
            "fn must have an operation that reads both a parameter and an input, and an output, "
            f"got {len(program.ops)} operations and {outputs_tree.num_leaves} outputs. Pass the "
            "model's parameters as the first argument, and return what is computed from them."
        )
    return LayerSequence(mutating if mutating and mutated else fn, program, layers, signature)


def _without_mesh(x: Any) -> Any:
    """An array of a mesh with Explicit axes as a type without that mesh; others as they are."""
    if not isinstance(x, jax.Array) or jax.typeof(x).sharding.mesh.empty:
        return x
    return jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=x.weak_type)
