"""An optimiser traced on the user's tree, and which leaf owns which part of its state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import optax

from layerwise_jax.stage.placement import Placement
from layerwise_jax.train.leaf_program import FlatTrace, LeafProgram, find_owners, flatten_trace


@dataclass(frozen=True, eq=False)
class TracedOptimizer:
    """`init` and `update` of an optimiser, traced on the user's tree.

    Attributes:
      leaves: the leaves of the parameters that are trained; all others are `optax.MaskedNode` in
        the trace.
      init: from the trained leaves to the state.
      update: from gradients, state and trained leaves to updates and state.
      state_owners: for every leaf of the state, the parameter it belongs to, or None.
      state_avals: the type of every leaf of the state.
      state_tree: the state's tree.
    """

    leaves: tuple[int, ...]
    init: LeafProgram
    update: LeafProgram
    state_owners: tuple[int | None, ...]
    state_avals: tuple[Any, ...]
    state_tree: Any


def trace_optimizer(
    placement: Placement, trainable: Sequence[bool], optimizer: optax.GradientTransformation
) -> TracedOptimizer:
    """Trace an optimiser on the trained part of the user's tree.

    Raises:
      ValueError: the optimiser lets large values of several parameters meet, or wants the loss or
        its function.
    """
    signature = placement.signature
    leaves = tuple(i for i, trains in enumerate(trainable) if trains)
    avals = [
        jax.ShapeDtypeStruct(aval.shape, aval.dtype) if trains else optax.MaskedNode()
        for aval, trains in zip(signature.params_avals, trainable, strict=True)
    ]
    params = jax.tree.unflatten(signature.params_tree, avals)
    init, state = jax.make_jaxpr(optimizer.init, return_shape=True)(params)
    try:
        traced = jax.make_jaxpr(optimizer.update)(params, state, params)
    except TypeError as error:
        if "required keyword-only argument" not in str(error):
            raise
        raise ValueError(
            f"The optimiser's update takes more than gradients, state and parameters ({error}), "
            "which a staged step "
            "does not give. Leave that part of the chain out, and do its work between steps."
        ) from error
    update = flatten_trace(traced)
    state_avals, state_tree = jax.tree.flatten(state)
    sliced = frozenset(weight.leaf for weight in placement.copies() if weight.start is not None)
    init_program = find_owners(flatten_trace(init), leaves, sliced)
    owners = tuple(init_program.owner(x) for x in init_program.trace.outputs)
    owners, update_program = _settle(update, leaves, owners, sliced)
    return TracedOptimizer(
        leaves, init_program, update_program, owners, tuple(state_avals), state_tree
    )


def _settle(
    update: FlatTrace,
    leaves: tuple[int, ...],
    owners: tuple[int | None, ...],
    sliced: frozenset[int],
) -> tuple[tuple[int | None, ...], LeafProgram]:
    """State that an update makes from a leaf belongs to it from the start: owners of state, until
    they stay.
    """
    while True:
        program = find_owners(update, (*leaves, *owners, *leaves), sliced)
        made = tuple(program.owner(x) for x in update.outputs[len(leaves) :])
        settled = tuple(new if old is None else old for old, new in zip(owners, made, strict=True))
        if settled == owners:
            return owners, program
        owners = settled
