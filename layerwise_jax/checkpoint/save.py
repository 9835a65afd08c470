"""Checkpoints in the user's own tree: saved from one pipeline, restored into any other or none.

Files know nothing of stages. Parameters have the paths and shapes of the traced tree, and so has
the optimizer's state. They are two items of a step, `params` and `optimizer_state`, which orbax
reads without this package too.
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
    """Interface of an optimizer that gathers its placed state and places it again."""

    def gather_state(self, state: Any) -> Any:
        """State of the user's tree from a placed state; it can be traced."""
        ...

    def place_state(self, state: Any) -> Any:
        """Placed state from numpy arrays in the user's tree; the inverse of `gather_state`."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """Restored checkpoint, placed on the stages or in the user's tree.

    Attributes:
      step: the step that was read.
      params: the parameters.
      optimizer_state: the optimizer's state; None where it was not asked for.
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
    """Save placed parameters and optimizer state in the user's tree; returns once on disk.

    Orbax reads the files without this package, with `args.StandardRestore` and the unstaged trees.
    A tree that is a single array has the name `array` there.

    Args:
      directory: directory of steps; it is created if it does not exist.
      step: number of the step, later than every saved one.
      pipeline: the pipeline; every one of its processes calls this.
      staged: its placed parameters.
      optimizer_state: state of an optimizer that was initialized with placed parameters.
      optimizer: optimizer that gathers the state. None: parts of the state with the structure of
        the placed parameters are gathered as these are, which is right for elementwise optimizers.
      keep: number of latest steps to keep; earlier ones are deleted after this save. None: all.

    Raises:
      ValueError: the step is not later, `keep` is not positive, parameters or state belong to
        another pipeline, or a leaf cannot be saved. Nothing has been written then.
    """
    home = home_of(directory)
    check_new_step(home, step, keep)
    write_step(home, step, trees_to_save(pipeline, staged, optimizer_state, optimizer), keep)


def trees_to_save(
    pipeline: Pipeline, staged: Staged, optimizer_state: Any, optimizer: StateMover | None
) -> dict[str, Any]:
    """The user's trees by item, on the host or, of several processes, spread over all devices.

    Raises:
      ValueError: parameters or state belong to another pipeline.
    """
    pipeline.placement.check_staged(staged)
    trees = {PARAMS: _gather(pipeline.placement, staged)}
    if optimizer_state is not None:
        mover = _mover(pipeline, optimizer_state, optimizer)
        trees[OPTIMIZER_STATE] = mover.gather_state(optimizer_state)
    return trees


def _mover(pipeline: Pipeline, optimizer_state: Any, optimizer: StateMover | None) -> StateMover:
    if optimizer is None:
        return _EntryByEntry(pipeline, optimizer_state)
    if not hasattr(optimizer, "gather_state"):
        raise ValueError(
            "optimizer must be an optimizer of placed trees, got "
            f"{type(optimizer).__name__}. Pass step.optimizer of a training step, or "
            "pipeline.optimizer(...)."
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
    """Read a checkpoint onto the stages of a pipeline of the same model.

    The pipeline may have other stages, another schedule and another mesh than the one that saved.

    Args:
      directory: directory of steps.
      pipeline: the pipeline.
      optimizer_state: a state for this pipeline's placed parameters, or its types from
        `jax.eval_shape`; values are not read. None: restore the parameters only.
      optimizer: optimizer that gathers and places the state, as in `save_checkpoint`.
      step: the step to read; None: the latest.

    Returns:
      The step, the placed parameters and the placed optimizer state.

    Raises:
      CheckpointError: the step does not exist, its files are damaged, or a leaf has another name,
        shape or dtype than the pipeline's; the message names the paths that differ.
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
      directory: directory of steps.
      params: parameters of the unstaged model, or their types from `jax.eval_shape`.
      optimizer_state: the optimizer's state, or its types. None: read the parameters only.
      step: the step to read; None: the latest.

    Returns:
      The step, and parameters and optimizer state in the given trees, on JAX's default device.

    Raises:
      CheckpointError: as `restore_checkpoint` does.
    """
    found = _read(directory, params, optimizer_state, step)
    return Checkpoint(found.step, _to_device(found.params), _to_device(found.optimizer_state))


def checkpoint_steps(directory: Directory) -> tuple[int, ...]:
    """Saved steps of a directory, in order; none if the directory does not exist.

    Raises:
      ValueError: the path is a file.
    """
    return saved_steps(home_of(directory))


def home_of(directory: Directory) -> Path:
    """The absolute path of a directory of steps."""
    return Path(directory).expanduser().absolute()


def _read(
    directory: Directory,
    params: Any,
    optimizer_state: Any,
    step: int | None,
    mesh: Mesh | None = None,
) -> Checkpoint:
    """Checkpoint in the user's tree, with leaves on the host."""
    home = home_of(directory)
    chosen = find_step(home, step)
    found = read_step(home, chosen, {PARAMS: params, OPTIMIZER_STATE: optimizer_state}, mesh)
    return Checkpoint(chosen, found[PARAMS], found[OPTIMIZER_STATE])


@dataclass(frozen=True)
class _EntryByEntry:
    """State mover of elementwise optimizers: state is gathered and placed like the weights.

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
        """The pipeline's placement with the dtypes of a part of the state."""
        placement = self.pipeline.placement
        for slot in placement.slots:
            shape = getattr(node[slot.name], "shape", None)
            expected = (placement.num_devices, *slot.aval.shape)
            if shape != expected:
                raise ValueError(
                    f"optimizer_state{jax.tree_util.keystr(path)} must have shape {expected} for "
                    f"slot {slot.name}, one entry per weight, got {shape}. Pass optimizer=, the "
                    "optimizer of this state, which gathers and places it."
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
        _together([processes.read_shard(staged[name], d) for _, name, d in sorted(rows)])
        for _, rows in sorted(parts.items())
    ]
    return jax.tree.unflatten(placement.signature.params_tree, leaves)


def _together(rows: list[Any]) -> Any:
    if len(rows) == 1:
        return rows[0]
    return jnp.concatenate(rows) if is_key(rows[0]) else np.concatenate(rows)


def _to_device(tree: Any) -> Any:
    """Arrays that are bound to no device, so that they can be used with those of the stages."""

    def unbound(leaf: Any) -> Any:
        return (
            wrap_key(np.asarray(jax.random.key_data(leaf)), leaf)
            if is_key(leaf)
            else jnp.asarray(leaf)
        )

    return jax.tree.map(unbound, tree)
