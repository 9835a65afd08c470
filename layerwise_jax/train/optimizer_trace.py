"""Trace of an optimizer on the user's tree, with the owner of every leaf of its state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import optax

from layerwise_jax._jax import key_paths
from layerwise_jax.stage.placement import Placement
from layerwise_jax.trace.flatten import flatten
from layerwise_jax.trace.flatten_policy import OPTIMIZER
from layerwise_jax.trace.program import Program
from layerwise_jax.train.leaf_program import LeafProgram, find_owners


@dataclass(frozen=True, eq=False)
class TracedOptimizer:
    """`init` and `update` of an optimizer, traced on the user's tree.

    Attributes:
      leaves: trained leaves of the parameters; all others are `optax.MaskedNode` in the trace.
      init: trained leaves -> state.
      update: gradients, state, trained leaves -> updates, state.
      state_owners: parameter leaf that each leaf of the state belongs to, or None.
      state_avals: type of every leaf of the state.
      state_paths: key path of every leaf of the state.
      state_tree: tree structure of the state.
    """

    leaves: tuple[int, ...]
    init: LeafProgram
    update: LeafProgram
    state_owners: tuple[int | None, ...]
    state_avals: tuple[Any, ...]
    state_paths: tuple[Any, ...]
    state_tree: Any


def trace_optimizer(
    placement: Placement, trainable: Sequence[bool], optimizer: optax.GradientTransformation
) -> TracedOptimizer:
    """Trace an optimizer on the trained part of the user's tree.

    Raises:
      ValueError: the optimizer combines large values of several parameters, or its update takes the
        loss or the loss function.
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
            "optimizer must be updated from gradients, state and parameters only, got one that "
            f"takes more ({error}). Leave that part of the chain out, and do its work between "
            "steps."
        ) from error
    update = flatten(traced, 0, OPTIMIZER)
    state_paths, state_avals, state_tree = key_paths(state)
    sliced = frozenset(weight.leaf for weight in placement.copies() if weight.start is not None)
    init_program = find_owners(flatten(init, 0, OPTIMIZER), leaves, sliced)
    owners = tuple(init_program.owner(x) for x in init_program.trace.outputs)
    owners, update_program = _settle(update, leaves, owners, sliced)
    return TracedOptimizer(
        leaves=leaves,
        init=init_program,
        update=update_program,
        state_owners=owners,
        state_avals=tuple(state_avals),
        state_paths=tuple(state_paths),
        state_tree=state_tree,
    )


def _settle(
    update: Program,
    leaves: tuple[int, ...],
    owners: tuple[int | None, ...],
    sliced: frozenset[int],
) -> tuple[tuple[int | None, ...], LeafProgram]:
    """Owners of the state, and the update's program: a fixed point.

    State that an update computes from one leaf belongs to that leaf, which may give other state an
    owner; repeated until no owner changes.
    """
    while True:
        readers = (*leaves, *owners)  # of updates and state
        program = find_owners(update, (*leaves, *owners, *leaves), sliced, readers)
        made = tuple(program.owner(x) for x in update.outputs[len(leaves) :])
        settled = tuple(new if old is None else old for old, new in zip(owners, made, strict=True))
        if settled == owners:
            return owners, program
        owners = settled
