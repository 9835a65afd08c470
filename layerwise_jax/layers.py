"""Trace a function and find its layers.

No annotation is needed. The operations that meet both parameters and data are walked in the order of the trace; each
belongs to the module whose parameters it reads, and between the last use of one module's parameters and the first use
of the next's the program is cut where the fewest bytes are alive. Operations that meet no data, or no parameters
(masks, casts, keys), have no place of their own: they go with whatever uses them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import jax
import numpy as np

from layerwise_jax import _jax
from layerwise_jax._jax import Literal
from layerwise_jax.flatten import FROM_INPUTS, FROM_WEIGHTS, flatten, source_flags
from layerwise_jax.modules import Module, modules_of, path_names
from layerwise_jax.program import Program, Value, Weight, evaluate, nbytes

# Work on inputs alone that is too much to be done again in every stage that needs its result.
EXPENSIVE = frozenset(
    "dot_general conv_general_dilated ragged_dot scan while cond sort fft cholesky lu qr eigh svd triangular_solve "
    "custom_jvp_call custom_vjp_call pallas_call ffi_call pure_callback io_callback debug_callback".split()
)
# Operations with which a module begins anew when it is used a second time.
CONTRACTIONS = frozenset("dot_general conv_general_dilated ragged_dot gather custom_vjp_call pallas_call scan".split())


@dataclass(frozen=True)
class Layer:
    """A run of anchored operations: `program.ops[i]` for i in `anchors`."""

    name: str
    anchors: tuple[int, ...]


@dataclass(frozen=True)
class Signature:
    """What a function was traced with: the trees and types of parameters and inputs, and the tree of outputs."""

    params_tree: Any
    params_avals: tuple[Any, ...]
    params_paths: tuple[Any, ...]
    inputs_tree: Any
    inputs_avals: tuple[Any, ...]
    outputs_tree: Any
    outputs_avals: tuple[Any, ...]

    @property
    def params_names(self) -> tuple[str, ...]:
        """The path of every parameter, as JAX prints it."""
        return tuple(jax.tree_util.keystr(path) for path in self.params_paths)


@dataclass(frozen=True, eq=False)
class LayerSequence:
    """A traced function as layers in order; calling it runs them one after the other, operation by operation.

    Attributes:
      fn: the function that was traced, `fn(params, *inputs)`.
      program: its flat program, at the shapes it was traced with.
      layers: contiguous runs that together hold every anchored operation once.
      signature: trees and types of what goes in and comes out.
    """

    fn: Callable[..., Any]
    program: Program
    layers: tuple[Layer, ...]
    signature: Signature

    def __call__(self, params: Any, *inputs: Any) -> Any:
        """`fn(params, *inputs)`, evaluated layer by layer.

        Raises:
          ValueError: the trees of parameters or inputs are not the traced ones.
        """
        program = self.program
        came = jax.tree.structure(params), jax.tree.structure(inputs)
        wanted = self.signature.params_tree, self.signature.inputs_tree
        if came != wanted:
            raise ValueError(f"The layers were traced with parameters and inputs {wanted}; these are {came}.")
        leaves = jax.tree.leaves(params)
        env = dict(program.constants)
        env.update({value: weight.of(leaves[weight.leaf]) for value, weight in program.weights.items()})
        env.update(zip(program.inputs, jax.tree.leaves(inputs), strict=True))
        return jax.tree.unflatten(self.signature.outputs_tree, evaluate(program.ops, env, program.outputs))

    def with_program(self, program: Program) -> LayerSequence:
        """The same layers over a program whose operations are the same ones in the same places."""
        assert len(program.ops) == len(self.program.ops)
        return replace(self, program=program)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(layer.name for layer in self.layers)

    @cached_property
    def boundary_bytes(self) -> tuple[int, ...]:
        """Bytes alive at each boundary 0..n between layers (both ends are 0): what a cut there would send."""
        widths = live_bytes(self.program, [i for layer in self.layers for i in layer.anchors])
        ends = np.cumsum([0] + [len(layer.anchors) for layer in self.layers])
        return tuple(widths[end] for end in ends)

    def __str__(self) -> str:
        width = max(len(name) for name in self.names)
        rows = [
            f"{name:{width}}  {len(layer.anchors):4} operations  {cut:>12,} bytes out"
            for name, layer, cut in zip(self.names, self.layers, self.boundary_bytes[1:], strict=True)
        ]
        return "\n".join(rows)


def trace_layers(fn: Callable[..., Any], params: Any, *inputs: Any) -> LayerSequence:
    """Trace `fn(params, *inputs)` and find its layers.

    Args:
      fn: any JAX function of a tree of parameters and inputs: a Flax model's `apply`, or plain JAX.
      params: the parameters, as arrays or `jax.ShapeDtypeStruct`; nothing is computed.
      *inputs: one microbatch of inputs, likewise.

    Raises:
      ValueError: the function reads no parameter in any operation on its inputs (there is nothing to stage), returns
        nothing, or closes over a traced array.
    """
    paths, leaves, params_tree = _jax.key_paths(params)
    input_leaves, inputs_tree = jax.tree.flatten(inputs)
    jaxpr, outputs = jax.make_jaxpr(fn, return_shape=True)(params, *inputs)
    program = flatten(jaxpr, len(leaves))
    output_leaves, outputs_tree = jax.tree.flatten(outputs)
    signature = Signature(
        params_tree=params_tree,
        params_avals=tuple(var.aval for var in jaxpr.invars[: len(leaves)]),
        params_paths=tuple(paths),
        inputs_tree=inputs_tree,
        inputs_avals=tuple(var.aval for var in jaxpr.invars[len(leaves) :]),
        outputs_tree=outputs_tree,
        outputs_avals=tuple(output_leaves),
    )
    assert len(input_leaves) == len(signature.inputs_avals)
    layers = find_layers(program, modules_of([path_names(path) for path in paths]))
    if not layers or not outputs_tree.num_leaves:
        raise ValueError(
            "The function has no layer: no operation on its inputs reads a parameter. "
            "Give the model's parameters as the first argument, and return what is computed from them."
        )
    return LayerSequence(fn, program, layers, signature)


def anchored_ops(program: Program) -> list[int]:
    """Positions of the operations that stay where the trace put them; all others go with their users.

    Anchored is what meets both parameters and data, what is too costly to repeat, what has an effect, and what depends
    on any of these.
    """
    flags = source_flags(program)
    anchored, made = [], set()
    for i, op in enumerate(program.ops):
        flag = 0
        for x in op.values:
            flag |= flags[x]
        costly = flag & FROM_INPUTS and op.name in EXPENSIVE
        if flag == FROM_INPUTS | FROM_WEIGHTS or costly or op.eqn.effects or made.intersection(op.values):
            anchored.append(i)
            made.update(op.results)
    return anchored


def live_bytes(program: Program, anchors: Sequence[int]) -> list[int]:
    """Bytes alive before each anchored operation, and after the last: values made by one and used by a later one."""
    last_use: dict[Value, tuple[int, int]] = {}
    for position, i in enumerate(anchors):
        last_use.update(dict.fromkeys(program.ops[i].results, (position, position)))
        for x in program.ops[i].values:
            if x in last_use:
                last_use[x] = (last_use[x][0], position)
    change = np.zeros(len(anchors) + 1, dtype=np.int64)
    for x, (made, used) in last_use.items():
        if used > made:
            change[made + 1] += nbytes(program.avals[x])
            change[used + 1] -= nbytes(program.avals[x])
    return [int(width) for width in np.cumsum(change)]


def find_layers(program: Program, modules: Sequence[Module | None]) -> tuple[Layer, ...]:
    """The layers of a program, given the module of every parameter leaf; None for state, which belongs to its user."""
    anchors = anchored_ops(program)
    runs = _runs_of_modules(program, anchors, modules)
    if not runs:
        return ()
    widths, parted = live_bytes(program, anchors), _positions_that_part_state(program, anchors, modules)
    starts = [0]
    for (_, _, last), (_, first, _) in pairwise(runs):
        candidates = range(last + 1, first + 1)
        starts.append(min(candidates, key=lambda position: (position in parted, widths[position], -position)))
    stops = [*starts[1:], len(anchors)]
    names = _unique([name for name, _, _ in runs])
    return tuple(
        Layer(name, tuple(anchors[start:stop])) for name, start, stop in zip(names, starts, stops, strict=True)
    )


def _positions_that_part_state(program: Program, anchors: Sequence[int], modules: Sequence[Module | None]) -> set[int]:
    """The positions at which a cut would leave uses of one leaf of state on both sides."""
    weights_of = _weights_behind(program)
    uses: dict[Weight, list[int]] = {}
    for position, i in enumerate(anchors):
        for weight in set().union(*(weights_of.get(x, frozenset()) for x in program.ops[i].values)):
            if modules[weight.leaf] is None:
                uses.setdefault(weight, []).append(position)
    return {position for used in uses.values() for position in range(used[0] + 1, used[-1] + 1)}


def _runs_of_modules(
    program: Program, anchors: Sequence[int], modules: Sequence[Module | None]
) -> list[tuple[str, int, int]]:
    """(module, first, last): maximal runs of anchored positions that read one module's parameters."""
    weights_of = _weights_behind(program)
    runs: list[tuple[str, int, int]] = []
    contracted: set[Weight] = set()
    for position, i in enumerate(anchors):
        op = program.ops[i]
        behind = set().union(*(weights_of.get(x, frozenset()) for x in op.values))
        weights = {weight for weight in behind if modules[weight.leaf] is not None}
        if not weights:
            continue
        contracts = op.name in CONTRACTIONS
        weight = min(weights, key=lambda w: (w.leaf, w.start or 0))
        module = modules[weight.leaf]
        assert module is not None
        name = module.name if weight.start is None else f"{module.name}[{weight.start}]"
        again = contracts and bool(weights & contracted)
        joins = module.is_bare and not contracts
        if runs and (joins or (runs[-1][0] == name and not again)):
            runs[-1] = (runs[-1][0], runs[-1][1], position)
        else:
            runs.append((name, position, position))
            contracted = set()
        contracted |= weights if contracts else set()
    return runs


def _weights_behind(program: Program) -> dict[Value, frozenset[Weight]]:
    """For every value that comes from weights alone: which."""
    flags = source_flags(program)
    behind = {value: frozenset([weight]) for value, weight in program.weights.items()}
    for op in program.ops:
        if op.results and flags[op.results[0]] == FROM_WEIGHTS:
            union = frozenset().union(*(behind.get(x, frozenset()) for x in op.values))
            behind.update(dict.fromkeys(op.results, union))
    return behind


def _unique(names: Sequence[str]) -> list[str]:
    """Names told apart where a module is used more than once."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if seen[name] == 1 else f"{name} (use {seen[name]})")
    return result


def free_ops_behind(program: Program, operands: Sequence[Any], free: dict[Value, int]) -> set[int]:
    """Positions of the unanchored operations that `operands` depend on.

    Args:
      program: the program.
      operands: values or literals.
      free: the position of the unanchored operation that makes each value.
    """
    found: set[int] = set()
    stack = [x for x in operands if not isinstance(x, Literal)]
    while stack:
        i = free.get(stack.pop())
        if i is not None and i not in found:
            found.add(i)
            stack.extend(program.ops[i].values)
    return found


def free_producers(program: Program, anchors: Sequence[int]) -> dict[Value, int]:
    """The position of the unanchored operation that makes each value."""
    anchored = set(anchors)
    return {x: i for i, op in enumerate(program.ops) if i not in anchored for x in op.results}
