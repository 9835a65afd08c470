"""Checkpoints in the user's own tree: saved from one pipeline, restored into another, or into none.

What is on disk knows nothing of stages: parameters have the paths and shapes of the tree that was
traced, and so has the optimiser's state. They are two items of a step, `params` and
`optimizer_state`, which orbax reads without this package too.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from layerwise_jax import processes
from layerwise_jax._jax import Tracer, is_key, wrap_key
from layerwise_jax.checkpoint.files import (
    check_new_step,
    find_step,
    read_step,
    saved_steps,
    write_step,
)
from layerwise_jax.pipeline import Pipeline
from layerwise_jax.stage.placement import Placement, Staged

PARAMS, OPTIMIZER_STATE = "params", "optimizer_state"
Directory = str | os.PathLike[str]


class StateMover(Protocol):
    """What knows how an optimiser's state lies on the stages: see the optimisers of this
    package.
    """

    def gather_state(self, state: Any) -> Any:
        """The state as the optimiser has it for the user's tree; it can be traced."""
        ...

    def place_state(self, state: Any) -> Any:
        """The inverse of `gather_state`; what comes are arrays of numpy's."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """What was read: placed on the stages, or in the user's tree.

    Attributes:
      step: the step that it was saved at.
      params: the parameters.
      optimizer_state: the optimiser's state, or None where it was not asked for.
    """

    step: int
    params: Any
    optimizer_state: Any = None


def save_checkpoint(
    directory: Directory,
    step: int,
    pipeline: Pipeline,
    staged: Staged,
    optimizer_state: Any = None,
    *,
    optimizer: StateMover | None = None,
    keep: int | None = None,
) -> None:
    """Save placed parameters, and the optimiser's state, in the user's tree; returns when they are
    on disk.

    Orbax alone reads them as well, with `args.StandardRestore` and the unstaged trees. A tree that
    is one bare array has the name `array` there.

    Args:
      directory: where the steps are; it is made if it is not there.
      step: later than every step that is there.
      pipeline: the pipeline, on devices of one process.
      staged: its placed parameters.
      optimizer_state: the state of an optimiser that was initialised with placed parameters.
      optimizer: what gathers that state. None: every part of it that has the form of the placed
        parameters is gathered as they are, which is right for optimisers that work entry by entry.
      keep: how many of the latest steps stay; those before are deleted once this one is saved.
        None: all.

    Raises:
      ValueError: the step is not later, `keep` is not positive, what came is not this pipeline's,
        or a leaf cannot be saved. Nothing has been written then.
    """
    home = _home(directory)
    check_new_step(home, step, keep)
    pipeline.placement.check_staged(staged)
    trees = {PARAMS: _gather(pipeline.placement, staged)}
    if optimizer_state is not None:
        mover = _mover(pipeline, optimizer_state, optimizer)
        trees[OPTIMIZER_STATE] = mover.gather_state(optimizer_state)
    write_step(home, step, trees, keep)


def _mover(pipeline: Pipeline, optimizer_state: Any, optimizer: StateMover | None) -> StateMover:
    if optimizer is None:
        return _EntryByEntry(pipeline, optimizer_state)
    if not hasattr(optimizer, "gather_state"):
        raise ValueError(
            f"optimizer came as {type(optimizer).__name__}, which gathers no state; "
            "step.optimizer of a training step, "
            "or pipeline.optimizer(...), is wanted."
        )
    return optimizer


def restore_checkpoint(
    directory: Directory,
    pipeline: Pipeline,
    optimizer_state: Any = None,
    *,
    optimizer: StateMover | None = None,
    step: int | None = None,
) -> Checkpoint:
    """Read a checkpoint onto the stages of a pipeline of the same model, whatever pipeline saved
    it.

    Args:
      directory: where the steps are.
      pipeline: the pipeline; the number of its stages, its schedule and its mesh are free.
      optimizer_state: the optimiser's state for placed parameters of this pipeline, as it was
        initialised or as `jax.eval_shape` gives it: its types are read, not its values. None: only
        the parameters are restored.
      optimizer: what gathers and places that state, as in `save_checkpoint`.
      step: which step; None: the latest.

    Returns:
      The step, the placed parameters and the optimiser's state.

    Raises:
      CheckpointError: there is no such step, its files are damaged, or a leaf has another name,
        shape or dtype than the pipeline's.
    """
    signature = pipeline.placement.signature
    params = jax.tree.unflatten(signature.params_tree, signature.params_avals)
    if optimizer_state is None:
        found = _read(directory, params, None, step, pipeline.mesh)
        return replace(found, params=pipeline.place(found.params))
    mover = _mover(pipeline, optimizer_state, optimizer)
    found = _read(
        directory, params, jax.eval_shape(mover.gather_state, optimizer_state), step, pipeline.mesh
    )
    return Checkpoint(
        found.step, pipeline.place(found.params), mover.place_state(found.optimizer_state)
    )


def read_checkpoint(
    directory: Directory, params: Any, optimizer_state: Any = None, *, step: int | None = None
) -> Checkpoint:
    """Read a checkpoint in the user's tree, for a run without a pipeline.

    Args:
      directory: where the steps are.
      params: parameters of the unstaged model, or their types as `jax.eval_shape` gives them.
      optimizer_state: the same of the optimiser's state for them. None: only the parameters are
        read.
      step: which step; None: the latest.

    Returns:
      The step, and the parameters and the optimiser's state in the trees that came, on JAX's
      default device.

    Raises:
      CheckpointError: as `restore_checkpoint` does.
    """
    found = _read(directory, params, optimizer_state, step)
    return Checkpoint(found.step, _to_device(found.params), _to_device(found.optimizer_state))


def checkpoint_steps(directory: Directory) -> tuple[int, ...]:
    """The steps that were saved in a directory, in order; none if the directory is not there.

    Raises:
      ValueError: it is no directory.
    """
    return saved_steps(_home(directory))


def _home(directory: Directory) -> Path:
    return Path(directory).expanduser().absolute()


def _read(
    directory: Directory,
    params: Any,
    optimizer_state: Any,
    step: int | None,
    mesh: Mesh | None = None,
) -> Checkpoint:
    """A checkpoint in the user's tree, its leaves on the host."""
    home = _home(directory)
    chosen = find_step(home, step)
    found = read_step(home, chosen, {PARAMS: params, OPTIMIZER_STATE: optimizer_state}, mesh)
    return Checkpoint(chosen, found[PARAMS], found[OPTIMIZER_STATE])


@dataclass(frozen=True)
class _EntryByEntry:
    """Moves the state of an optimiser that works entry by entry: slots of the state go where slots
    of weights go.

    Attributes:
      pipeline: the pipeline.
      like: a state, or its types.
    """

    pipeline: Pipeline
    like: Any

    def gather_state(self, state: Any) -> Any:
        def gather(path: Any, node: Any) -> Any:
            return _gather(self._typed(path, node), node) if self._has_slots(node) else node

        return jax.tree_util.tree_map_with_path(gather, state, is_leaf=self._has_slots)

    def place_state(self, state: Any) -> Any:
        def place(path: Any, like: Any, node: Any) -> Any:
            if self._has_slots(like):
                return self._typed(path, like).place(node, self.pipeline.mesh)
            return _to_device(node)

        return jax.tree_util.tree_map_with_path(place, self.like, state, is_leaf=self._has_slots)

    def _has_slots(self, node: Any) -> bool:
        return isinstance(node, dict) and set(node) == {
            slot.name for slot in self.pipeline.placement.slots
        }

    def _typed(self, path: Any, node: Staged) -> Placement:
        """The placement, for leaves of the dtypes that a part of the state has."""
        placement = self.pipeline.placement
        for slot in placement.slots:
            shape, wanted = (
                getattr(node[slot.name], "shape", None),
                (placement.num_devices, *slot.aval.shape),
            )
            if shape != wanted:
                raise ValueError(
                    f"The optimiser's state at {jax.tree_util.keystr(path)} came with shape "
                    f"{shape} for slot "
                    f"{slot.name}, wanted {wanted}, an entry for each entry of the weights. Pass "
                    "the optimiser that "
                    "made this state as optimizer=, so that it gathers and places the state itself."
                )
        slots = tuple(_retyped_slot(slot, node[slot.name].dtype) for slot in placement.slots)
        dtypes = {
            weight.leaf: slots[j].aval.dtype for weight, ((j, _), *_) in placement.copies().items()
        }
        avals = [
            jax.ShapeDtypeStruct(x.shape, dtypes[i])
            for i, x in enumerate(placement.signature.params_avals)
        ]
        return replace(
            placement,
            slots=slots,
            signature=replace(placement.signature, params_avals=tuple(avals)),
        )


def _retyped_slot(slot: Any, dtype: Any) -> Any:
    return replace(slot, aval=jax.ShapeDtypeStruct(slot.aval.shape, dtype))


def _gather(placement: Placement, staged: Staged) -> Any:
    """The user's tree on the host, gathered weight by weight; of tracers and global arrays, what
    `Placement.gather` gives.
    """
    if processes.is_partial(staged) or any(isinstance(x, Tracer) for x in staged.values()):
        return placement.gather(staged)
    parts: dict[int, list[tuple[int, str, int]]] = {}
    for weight, ((j, device), *_) in placement.copies().items():
        parts.setdefault(weight.leaf, []).append(
            (weight.start or 0, placement.slots[j].name, device)
        )
    leaves = [
        _together([_row(staged[name], d) for _, name, d in sorted(rows)])
        for _, rows in sorted(parts.items())
    ]
    return jax.tree.unflatten(placement.signature.params_tree, leaves)


def _together(rows: list[Any]) -> Any:
    if len(rows) == 1:
        return rows[0]
    return jnp.concatenate(rows) if is_key(rows[0]) else np.concatenate(rows)


def _row(array: Any, device: int) -> Any:
    """One device's row on the host, read from the shard that has it; keys stay keys."""
    if is_key(array):
        return wrap_key(_row(jax.random.key_data(array), device), array)
    return processes.read_shard(array, device)


def _to_device(tree: Any) -> Any:
    """Arrays that are bound to no device, so that they can be used with those of the stages."""

    def unbound(leaf: Any) -> Any:
        return (
            wrap_key(np.asarray(jax.random.key_data(leaf)), leaf)
            if is_key(leaf)
            else jnp.asarray(leaf)
        )

    return jax.tree.map(unbound, tree)
