"""What cannot be staged, found before anything runs, and said in words."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax

from layerwise_jax._jax import AbstractRef, Literal, effects_but_axes, source_line
from layerwise_jax.stage.cut import CutError
from layerwise_jax.trace.layers import LayerSequence
from layerwise_jax.trace.program import Program, Weight


def check_stageable(program: Program, axes: Collection[str] = ()) -> None:
    """Refuse operations that a loop over microbatches on other devices would run differently.

    Args:
      program: the program.
      axes: mesh axes over which it may communicate: those inside a stage.

    Raises:
      CutError: an effect (a print, a callback) or a sharding that names devices.
    """
    for op in program.ops:
        effects = effects_but_axes(op.eqn, axes)
        if effects and not any(isinstance(aval, AbstractRef) for aval in _avals(program, op)):
            raise CutError(
                f"{op.name} at {source_line(op.eqn)} has an effect; in a pipeline it would run "
                "once a tick and device, "
                "idle ticks included. Remove it from the function that is staged."
            )
        if op.name == "sharding_constraint" or op.name in ("jit", "pjit"):
            raise CutError(
                f"{op.name} at {source_line(op.eqn)} places its value on devices of its own; a "
                "stage's values live on "
                "the stage's device. Remove the sharding from the function that is staged."
            )


def _avals(program: Program, op: Any) -> list[Any]:
    return [program.avals[x] for x in (*op.values, *op.results)]


def find_state(
    layers: LayerSequence, pick: Callable[[Any], Any] | None, replicas: int
) -> dict[int, Weight]:
    """The outputs that are new values of weights.

    Args:
      layers: the traced function.
      pick: chooses from the function's outputs a tree whose paths are paths of the parameters.
      replicas: replicas of the pipeline.

    Raises:
      ValueError: what was picked is not part of the parameters, or replicas would each have a state
        of their own.
    """
    if pick is None:
        return {}
    if replicas > 1:
        raise ValueError(
            f"State with {replicas} replicas on the axis 'data': each would update its own copy. "
            "Use a mesh without that axis."
        )
    signature = layers.signature
    positions = jax.tree.unflatten(
        signature.outputs_tree, list(range(len(signature.outputs_avals)))
    )
    picked = jax.tree_util.tree_flatten_with_path(pick(positions))[0]
    leaves = {jax.tree_util.keystr(path): i for i, path in enumerate(signature.params_paths)}
    weights = {
        weight.leaf: weight for weight in layers.program.weights.values() if weight.start is None
    }
    found = {}
    for path, position in picked:
        name = jax.tree_util.keystr(path)
        if name not in leaves:
            raise ValueError(
                f"state= picked {name}, which is no parameter; it must keep the paths of the "
                "parameters."
            )
        leaf = leaves[name]
        if leaf not in weights:
            raise ValueError(
                f"The state {name} is stacked over the layers of a scan, which live on several "
                "stages. "
                "Unroll the layers, or keep that state out of the scan."
            )
        wanted, came = signature.params_avals[leaf], signature.outputs_avals[position]
        if (wanted.shape, wanted.dtype) != (came.shape, came.dtype):
            raise ValueError(f"The new state {name} is {came}, the parameter is {wanted}.")
        if not isinstance(layers.program.outputs[position], Literal):
            found[position] = weights[leaf]
    return found


def find_frozen(layers: LayerSequence, trainable: Any) -> frozenset[Weight]:
    """The weights that are not to be trained.

    Args:
      layers: the traced function.
      trainable: a tree of booleans, the parameters' or a prefix of it, or a function from their
        types to one, or None.

    Raises:
      ValueError: it is no such tree.
    """
    if trainable is None:
        return frozenset()
    signature = layers.signature
    params = jax.tree.unflatten(signature.params_tree, list(signature.params_avals))
    mask = trainable(params) if callable(trainable) else trainable
    try:
        flags = jax.tree.leaves(
            jax.tree.map(lambda flag, part: jax.tree.map(lambda _: flag, part), mask, params)
        )
    except ValueError as error:
        raise ValueError(f"trainable= has another tree than the parameters: {error}") from error
    wrong = [flag for flag in flags if not isinstance(flag, bool)]
    if wrong:
        raise ValueError(
            f"trainable= has {wrong[0]!r} among its leaves; True or False is wanted for every "
            "parameter."
        )
    return frozenset(weight for weight in layers.program.weights.values() if not flags[weight.leaf])


def check_draws(program: Program, state: Mapping[int, Weight]) -> None:
    """Refuse random numbers that are drawn for the whole batch with a key that each microbatch
    changes.

    A microbatch takes its rows of what is drawn for the whole batch, so all must draw the same.

    Raises:
      CutError: naming the draw.
    """
    changing = set(state.values())
    from_state = {value for value, weight in program.weights.items() if weight in changing}
    for op in program.ops:
        if from_state.isdisjoint(op.values):
            continue
        from_state.update(op.results)
        if op.full_rows is not None:
            raise CutError(
                f"{op.name} at {source_line(op.eqn)} draws numbers for every example from state "
                "that each microbatch "
                "changes; they would be those of no batch. Leave that state out of state=, or use "
                "one microbatch."
            )


def check_state(loop_state: dict[int, Weight], stages: Any) -> None:
    """Refuse state that more than one stage reads, or that another stage updates than reads.

    Raises:
      CutError: naming the stages.
    """
    for position, weight in loop_state.items():
        readers = [s for s, stage in enumerate(stages) if weight in stage.weights.values()]
        (maker,) = [s for s, stage in enumerate(stages) if position in stage.outputs]
        if readers and readers != [maker]:
            raise CutError(
                f"The state of leaf {weight.leaf} is read on stages {readers} and updated on "
                f"stage {maker}; "
                "it can only live on one. Choose boundaries that keep its layer together."
            )
