"""Validation: rejects functions that cannot be staged, with actionable errors."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax

from layerwise_jax._jax import AbstractRef, effects_but_axes, source_line
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
        # A jit that is still there was not inlined because it carries shardings.
        if op.name == "sharding_constraint" or op.name in ("jit", "pjit"):
            raise CutError(
                f"{op.name} at {source_line(op.eqn)} names devices for its value; the values of a "
                "stage live on the stage's device. Remove the sharding from the staged function."
            )


def _avals(program: Program, op: Any) -> list[Any]:
    return [program.avals[x] for x in (*op.values, *op.results)]


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
    # types only: a function of shapes decides too, such as `x.ndim > 1`
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
    return frozenset(
        weight
        for weight in layers.program.weights.values()
        if not weight.is_captured and not flags[weight.leaf]
    )
