"""Validation: rejects functions that cannot be staged, with actionable errors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax

from layerwise_jax._jax import AbstractRef, Literal, effects_but_axes, source_line
from layerwise_jax.stage.cut import CutError
from layerwise_jax.trace.layers import LayerSequence
from layerwise_jax.trace.program import Program, Weight


def check_stageable(program: Program, axes: Collection[str] = ()) -> None:
    """Refuse operations that would run differently in a loop over microbatches.

    Args:
      program: the program.
      axes: mesh axes over which it may communicate: those inside a stage.

    Raises:
      CutError: an effect (a print, a callback) or a sharding that names devices.
    """
    for op in program.ops:
        effects = effects_but_axes(op.eqn, axes)
        # Reads and writes of a mutable reference are effects too; cut_stages keeps it in one stage.
        if effects and not any(isinstance(aval, AbstractRef) for aval in _avals(program, op)):
            raise CutError(
                f"{op.name} at {source_line(op.eqn)} has an effect; in a pipeline it would run "
                "once a tick and device, idle ticks included. Remove it from the staged function."
            )
        if op.name == "sharding_constraint" or op.name in ("jit", "pjit"):
            raise CutError(
                f"{op.name} at {source_line(op.eqn)} names devices for its value; the values of a "
                "stage live on the stage's device. Remove the sharding from the staged function."
            )


def _avals(program: Program, op: Any) -> list[Any]:
    return [program.avals[x] for x in (*op.values, *op.results)]


def find_state(
    layers: LayerSequence, pick: Callable[[Any], Any] | None, replicas: int
) -> dict[int, Weight]:
    """State of the function: output position -> the weight whose new value that output is.

    Args:
      layers: the traced function.
      pick: takes a tree of the function's outputs from it; its paths are paths of the parameters.
      replicas: replicas of the pipeline.

    Raises:
      ValueError: a picked output is not a parameter, or differs from it in type; or there are
        several replicas, each of which would update its copy differently.
    """
    if pick is None:
        return {}
    if replicas > 1:
        raise ValueError(
            f"state= must be None with {replicas} replicas on the axis 'data', since each would "
            "update its own copy. Use a mesh without that axis."
        )
    signature = layers.signature
    # `pick` runs on output positions instead of arrays.
    positions = jax.tree.unflatten(
        signature.outputs_tree, list(range(len(signature.outputs_avals)))
    )
    picked = jax.tree_util.tree_flatten_with_path(pick(positions))[0]
    leaves = {jax.tree_util.keystr(path): i for i, path in enumerate(signature.params_paths)}
    weights = {
        weight.leaf: weight for weight in layers.program.weights.values() if weight.start is None
    }
    found: dict[int, Weight] = {}
    for path, position in picked:
        name = jax.tree_util.keystr(path)
        if name not in leaves:
            raise ValueError(
                f"state= must pick outputs by the paths of parameters, got {name}, which is no "
                "parameter. Return new values under the parameters' own paths."
            )
        leaf = leaves[name]
        if leaf not in weights:
            raise ValueError(
                f"The state {name} is stacked over the layers of a scan, which live on several "
                "stages. Unroll the layers, or keep that state out of the scan."
            )
        expected = signature.params_avals[leaf]
        given = signature.outputs_avals[position]
        if (expected.shape, expected.dtype) != (given.shape, given.dtype):
            raise ValueError(
                f"The new state {name} must be {expected}, as the parameter is, got {given}. "
                "Return it in the parameter's shape and dtype."
            )
        # An output that is a literal never changes: no state to update.
        if not isinstance(layers.program.outputs[position], Literal):
            found[position] = weights[leaf]
    return found


def find_frozen(layers: LayerSequence, trainable: Any) -> frozenset[Weight]:
    """The frozen weights: those that `value_and_grad` does not differentiate.

    Args:
      layers: the traced function.
      trainable: a tree of booleans with the structure of the parameters or a prefix of it; or a
        function from the parameters' types to such a tree; or None, all trainable.

    Raises:
      ValueError: the tree does not match the parameters, or a leaf is not a boolean.
    """
    if trainable is None:
        return frozenset()
    signature = layers.signature
    params = jax.tree.unflatten(signature.params_tree, list(signature.params_avals))
    mask = trainable(params) if callable(trainable) else trainable
    try:
        # A flag of a prefix holds for all leaves below it.
        flags = jax.tree.leaves(
            jax.tree.map(lambda flag, part: jax.tree.map(lambda _: flag, part), mask, params)
        )
    except ValueError as error:
        raise ValueError(
            f"trainable must be a tree with the parameters' structure or a prefix of it, got "
            f"another: {error}"
        ) from error
    wrong = [flag for flag in flags if not isinstance(flag, bool)]
    if wrong:
        raise ValueError(
            f"trainable must have True or False for every parameter, got {wrong[0]!r}. Give "
            "booleans, such as jax.tree.map(lambda x: x.ndim > 1, params)."
        )
    return frozenset(weight for weight in layers.program.weights.values() if not flags[weight.leaf])


def check_draws(program: Program, state: Mapping[int, Weight]) -> None:
    """Refuse random draws with a key that every microbatch changes.

    Draws are made for the full batch, and each microbatch slices out its rows; so all microbatches
    must draw with one key.

    Raises:
      CutError: naming the draw.
    """
    changing = set(state.values())
    # values that depend on state, found in the order of the trace
    from_state = {value for value, weight in program.weights.items() if weight in changing}
    for op in program.ops:
        if from_state.isdisjoint(op.values):
            continue
        from_state.update(op.results)
        if op.full_rows is not None:
            raise CutError(
                f"{op.name} at {source_line(op.eqn)} draws numbers for every example from state "
                "that each microbatch changes; no unstaged batch draws those numbers. Leave that "
                "state out of state=, or use one microbatch."
            )


def check_state(loop_state: dict[int, Weight], stages: Any) -> None:
    """Refuse state that is not read and updated on one and the same stage.

    Args:
      loop_state: output position -> weight, as `find_state` returns it.
      stages: the stages.

    Raises:
      CutError: naming the stages.
    """
    for position, weight in loop_state.items():
        readers = [s for s, stage in enumerate(stages) if weight in stage.weights.values()]
        (maker,) = [s for s, stage in enumerate(stages) if position in stage.outputs]
        if readers and readers != [maker]:
            raise CutError(
                f"The state of leaf {weight.leaf} is read on stages {readers} and updated on "
                f"stage {maker}; it can only live on one. Choose boundaries that keep its layer "
                "together."
            )
