"""Trees on disk, by orbax: a directory of steps, each with items that are written together or not
at all.

A step gets its name only when all of it is on disk, so a process that is killed while it saves
leaves the steps before as they were. Whatever is read is held against what is wanted first: names,
shapes and dtypes of all leaves. Orbax does not see that bits have changed in large arrays, so every
step has an item of checksums besides.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from layerwise_jax import processes
from layerwise_jax._arguments import checked_int
from layerwise_jax._jax import is_key
from layerwise_jax.checkpoint.checksums import checksums
from layerwise_jax.trace.modules import path_names

try:
    import orbax.checkpoint as ocp
except ImportError as error:
    raise ImportError(
        "Checkpoints are written by orbax: install layerwise-jax[checkpoint]."
    ) from error
BARE = "array"
"""What a tree that is one array is called on disk, where everything has a name."""
CHECKSUMS = "checksums"
Types = dict[str, tuple[tuple[int, ...], np.dtype]]


class CheckpointError(ValueError):
    """There is no such checkpoint, or it is damaged, or it holds something else than was wanted."""


def saved_steps(directory: Path) -> tuple[int, ...]:
    """The steps in a directory, in order; none if the directory is not there.

    Raises:
      ValueError: it is no directory.
    """
    if not processes.exists(directory):
        return ()
    if not processes.is_directory(directory):
        raise ValueError(
            f"{directory} is no directory; wanted one for checkpoints, or a path where to make one."
        )
    with _manager(directory, ()) as orbax:
        found = sorted(orbax.all_steps())
    return tuple(processes.decide(lambda: found))


def check_new_step(directory: Path, step: Any, keep: Any) -> None:
    """Refuse what cannot be saved as the latest step.

    Raises:
      ValueError: the step is no integer, or not later than all others; `keep` is not positive.
    """
    checked_int("step", step, least=0)
    if keep is not None:
        checked_int("keep", keep)
    if (latest := max(saved_steps(directory), default=-1)) >= step:
        raise ValueError(
            f"Step {step} cannot be saved into {directory}, which has step {latest} already: "
            "nothing is overwritten. "
            "Pass a later step, or another directory."
        )


def write_step(directory: Path, step: int, trees: Mapping[str, Any], keep: int | None) -> None:
    """Write trees as the items of a step; those without leaves have no item.

    Raises:
      ValueError: a leaf cannot be saved; nothing has been written.
    """
    items = {item: _savable(item, tree) for item, tree in trees.items() if jax.tree.leaves(tree)}
    saved_sums = ocp.args.JsonSave(
        {item: checksums(_by_name(tree)) for item, tree in items.items()}
    )
    saves = {item: ocp.args.StandardSave(tree) for item, tree in items.items()}
    # What a save that was killed has left behind is deleted.
    options = {
        "create": True,
        "cleanup_tmp_directories": True,
        "max_to_keep": keep and operator.index(keep),
    }
    with _manager(directory, items, **options) as orbax:
        saved = orbax.save(
            operator.index(step), args=ocp.args.Composite(**saves, **{CHECKSUMS: saved_sums})
        )
    assert saved, "orbax has left out a step that is the latest"


def find_step(directory: Path, step: int | None) -> int:
    """The step itself if it is there; for None, the latest.

    Raises:
      ValueError: the step is no integer, or negative.
      CheckpointError: there is none.
    """
    steps = saved_steps(directory)
    if step is None and steps:
        return steps[-1]
    if step is not None:
        checked_int("step", step, least=0)
    if step in steps:
        return operator.index(step)
    wanted, there = "the latest step" if step is None else f"step {step}", f"steps {_listed(steps)}"
    raise CheckpointError(
        f"Wanted {wanted}, but {directory} has {there if steps else 'no checkpoint'}."
    )


def read_step(
    directory: Path, step: int, trees: Mapping[str, Any], mesh: Mesh | None = None
) -> dict[str, Any]:
    """Read the items of a step onto the host, into trees of these types; those without leaves come
    back as they are.

    Raises:
      CheckpointError: leaves have other names, shapes or dtypes, or the files are damaged.
    """
    wanted = {item: _named(tree) for item, tree in trees.items() if jax.tree.leaves(tree)}
    with _manager(directory, wanted) as orbax:
        try:
            found = _restore(orbax, step, wanted, mesh)
        except CheckpointError:
            raise
        except (
            Exception
        ) as error:  # orbax lets through whatever its readers of files and of JSON raise
            raise CheckpointError(
                f"Step {step} of {directory} is damaged: {shorten(str(error), 200)} Restore "
                "another of the steps "
                f"{_listed(orbax.all_steps())}, or bring its files back."
            ) from error
    return {
        item: _like(tree, found[item]) if item in wanted else tree for item, tree in trees.items()
    }


def _restore(
    orbax: ocp.CheckpointManager, step: int, wanted: Mapping[str, Any], mesh: Mesh | None
) -> Any:
    saved = orbax.item_metadata(step)
    for item, tree in wanted.items():
        _check_types(f"Step {step} of {orbax.directory}", item, saved.get(item), tree)
    restores = {
        item: ocp.args.StandardRestore(jax.tree.map(partial(_target, mesh), tree))
        for item, tree in wanted.items()
    }
    sums = (
        {CHECKSUMS: ocp.args.JsonRestore()} if CHECKSUMS in saved else {}
    )  # orbax alone writes none
    found = orbax.restore(step, args=ocp.args.Composite(**restores, **sums))
    for item in wanted if sums else ():
        _check_sums(found[item], found[CHECKSUMS][item])
    return found


def _manager(
    directory: Path, items: Mapping[str, Any] | tuple[()], **options: Any
) -> ocp.CheckpointManager:
    handlers: dict[str, Any] = {item: ocp.StandardCheckpointHandler() for item in items}
    handlers[CHECKSUMS] = ocp.JsonCheckpointHandler()
    options = {"enable_async_checkpointing": False, "create": False, **options}
    return ocp.CheckpointManager(
        directory, item_handlers=handlers, options=ocp.CheckpointManagerOptions(**options)
    )


def _named(tree: Any) -> Any:
    return {BARE: tree} if jax.tree_util.treedef_is_leaf(jax.tree.structure(tree)) else tree


def _like(tree: Any, found: Any) -> Any:
    return jax.tree.unflatten(jax.tree.structure(tree), jax.tree.leaves(found))


def _name(path: Any) -> str:
    return "/".join(path_names(path))


def _listed(steps: Any) -> str:
    return ", ".join(str(step) for step in sorted(steps))


def _savable(item: str, tree: Any) -> Any:
    """The tree on the host, as orbax takes it."""

    def savable(path: Any, leaf: Any) -> Any:
        if not isinstance(
            leaf, jax.Array | np.ndarray | np.generic | int | float | complex
        ) or not np.size(leaf):
            came = f"an array of shape {np.shape(leaf)}" if hasattr(leaf, "shape") else repr(leaf)
            raise ValueError(
                f"{item} has {came} at {_name(path)}; orbax saves arrays with at least one entry. "
                "Take it out."
            )
        typed = leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
        return typed if is_key(typed) or processes.is_partial(typed) else np.asarray(typed)

    return jax.tree_util.tree_map_with_path(savable, _named(tree))


def _target(mesh: Mesh | None, leaf: Any) -> Any:
    """The type by which orbax reads a leaf.

    Of one process: a numpy array on the host, here without memory, and random keys on its device.
    Of several: an array spread over the devices of `mesh`, of which each process reads its part.
    """
    typed = leaf if hasattr(leaf, "dtype") else jax.typeof(leaf)
    if mesh is not None and processes.is_distributed():
        sharding: Any = processes.spread(mesh, typed)
    elif is_key(typed):
        sharding = SingleDeviceSharding(processes.local_device())
    else:
        return np.broadcast_to(np.zeros((), typed.dtype), typed.shape)
    return jax.ShapeDtypeStruct(typed.shape, typed.dtype, sharding=sharding)


def _by_name(tree: Any) -> dict[str, Any]:
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _check_sums(tree: Any, wanted: Mapping[str, int]) -> None:
    if changed := [
        name for name, checksum in checksums(_by_name(tree)).items() if wanted[name] != checksum
    ]:
        raise ValueError(f"{', '.join(changed)} came with other bytes than were saved.")


def _check_types(origin: str, item: str, saved: Any, wanted: Any) -> None:
    if saved is None:
        raise CheckpointError(
            f"{origin} has no {item}, or the list of its leaves is lost. Ask for what was saved."
        )
    came, wants = _types(saved), _types(wanted)
    if missing := sorted(set(wants) - set(came)):
        raise CheckpointError(
            f"{origin} has no {item} {', '.join(missing)}, but {', '.join(sorted(came))}. "
            "Restore it into the model that it was saved from."
        )
    if surplus := sorted(set(came) - set(wants)):
        raise CheckpointError(
            f"{origin} has {item} {', '.join(surplus)}, but wanted was {', '.join(sorted(wants))} "
            "alone. "
            "Restore it into the model that it was saved from."
        )
    for name, (shape, dtype) in wants.items():
        if came[name] != (shape, dtype):
            raise CheckpointError(
                f"{origin} has {item} {name} as {came[name][1]}{list(came[name][0])}, but wanted "
                f"was {dtype}"
                f"{list(shape)}. Restore it into the model that it was saved from."
            )


def _types(tree: Any) -> Types:
    """Shape and dtype of every leaf, by name; of keys those of their data, which is what is on
    disk.
    """
    types: Types = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        typed = leaf if hasattr(leaf, "dtype") else jax.typeof(leaf)
        if is_key(typed):
            typed = jax.eval_shape(
                jax.random.key_data, jax.ShapeDtypeStruct(typed.shape, typed.dtype)
            )
        types[_name(path)] = (tuple(typed.shape), np.dtype(typed.dtype))
    return types
