"""Step directories on disk, written by orbax: each step holds items that are written atomically.

A step gets its name only when all of it is on disk, so a killed save leaves earlier steps intact.
Names, shapes and dtypes of all leaves are checked before anything is read. Each step also has an
item of checksums, since orbax does not notice changed bits in large arrays.
"""

from __future__ import annotations

import operator
import shutil
from collections.abc import Iterable, Mapping
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
"""Name on disk of a tree that is a single array."""
CHECKSUMS = "checksums"
DOOMED = "0.orbax-checkpoint-tmp-deleted"
"""Directory of steps to delete; orbax cleans up directories named so, and reads none of them."""
Types = dict[str, tuple[tuple[int, ...], np.dtype]]


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or holds another tree than the one asked for."""


def saved_steps(directory: Path) -> tuple[int, ...]:
    """Steps in a directory, in order; none if the directory does not exist.

    Raises:
      ValueError: the path is a file.
    """
    if not processes.exists(directory):
        return ()
    if not processes.is_directory(directory):
        raise ValueError(
            f"directory must be a directory or a new path, got the file {directory}. Pass another "
            "path."
        )
    with _manager(directory, ()) as orbax:
        found = sorted(orbax.all_steps())
    return tuple(processes.decide(lambda: found))


def check_new_step(directory: Path, step: Any, keep: Any) -> None:
    """Check that a step can be saved as the latest one.

    Raises:
      ValueError: `step` is not an int later than all others, or `keep` is not positive.
    """
    checked_int("step", step, least=0)
    if keep is not None:
        checked_int("keep", keep)
    if (latest := max(saved_steps(directory), default=-1)) >= step:
        raise ValueError(
            f"step must be later than step {latest} of {directory}, got {step}: steps are never "
            "overwritten. Pass a later step or another directory."
        )


def write_step(directory: Path, step: int, trees: Mapping[str, Any], keep: int | None) -> None:
    """Write trees as items of a step; a tree without leaves has no item. Returns once on disk.

    Raises:
      ValueError: a leaf cannot be saved. Nothing has been written then.
    """
    with open_to_write(directory, tuple(trees), keep, in_background=False) as orbax:
        start_step(orbax, step, trees)


def open_to_write(
    directory: Path, items: tuple[str, ...], keep: int | None, in_background: bool
) -> ocp.CheckpointManager:
    """A manager that writes steps with these items; temporary directories of killed saves go."""
    return _manager(
        directory,
        items,
        create=True,
        cleanup_tmp_directories=True,
        max_to_keep=keep and operator.index(keep),
        todelete_subdir=DOOMED,
        enable_async_checkpointing=in_background,
    )


def start_step(orbax: ocp.CheckpointManager, step: int, trees: Mapping[str, Any]) -> None:
    """Write a step by an open manager, or start to, if it writes in the background.

    Raises:
      ValueError: a leaf cannot be saved. Nothing has been written then.
    """
    items = {item: _savable(item, tree) for item, tree in trees.items() if jax.tree.leaves(tree)}
    sums = {item: checksums(_by_name(tree)) for item, tree in items.items()}
    saves: dict[str, Any] = {item: ocp.args.StandardSave(tree) for item, tree in items.items()}
    saves[CHECKSUMS] = ocp.args.JsonSave(sums)
    saved = orbax.save(operator.index(step), args=ocp.args.Composite(**saves))
    assert saved, "orbax skipped the latest step"
    _delete_doomed(directory=Path(orbax.directory))


def _delete_doomed(directory: Path) -> None:
    """Delete the steps that orbax has moved out of sight because newer ones are kept.

    By itself orbax deletes file by file under the step's own name, so that a killed process would
    leave half of a step behind.
    """
    if processes.is_main():
        shutil.rmtree(directory / DOOMED, ignore_errors=True)


def find_step(directory: Path, step: int | None) -> int:
    """The step to read: `step` itself, or the latest for None.

    Raises:
      ValueError: `step` is not an int of at least 0.
      CheckpointError: the directory has no such step.
    """
    steps = saved_steps(directory)
    if step is None and steps:
        return steps[-1]
    if step is not None:
        checked_int("step", step, least=0)
    if step in steps:
        return operator.index(step)
    there = f"steps {_listed(steps)}" if steps else "no checkpoint"
    raise CheckpointError(
        f"step must be a saved step of {directory}, which has {there}, got {step}. Pass a step of "
        "checkpoint_steps(directory)."
    )


def read_step(
    directory: Path, step: int, trees: Mapping[str, Any], mesh: Mesh | None = None
) -> dict[str, Any]:
    """Read items of a step onto the host, in trees of the given types.

    Trees without leaves are returned as they are.

    Raises:
      CheckpointError: leaves have other names, shapes or dtypes, or the files are damaged.
    """
    wanted = {item: _named(tree) for item, tree in trees.items() if jax.tree.leaves(tree)}
    with _manager(directory, wanted) as orbax:
        try:
            found = _restore(orbax, step, wanted, mesh)
        except CheckpointError:
            raise
        except Exception as error:  # orbax raises whatever its file and JSON readers raise
            raise CheckpointError(
                f"Step {step} of {directory} is damaged: {shorten(str(error), 200)} Restore "
                f"another step ({_listed(orbax.all_steps())}) or the step's files."
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
    # Steps that orbax wrote without this package have no checksums.
    sums = {CHECKSUMS: ocp.args.JsonRestore()} if CHECKSUMS in saved else {}
    try:
        found = orbax.restore(step, args=ocp.args.Composite(**restores, **sums))
    except ValueError:
        for item, tree in wanted.items():
            _check_nodes(f"Step {step} of {orbax.directory}", item, saved[item], tree)
        raise
    for item in wanted if sums else ():
        _check_sums(found[item], found[CHECKSUMS][item])
    return found


def _manager(directory: Path, items: Iterable[str], **options: Any) -> ocp.CheckpointManager:
    handlers: dict[str, Any] = {item: ocp.StandardCheckpointHandler() for item in items}
    handlers[CHECKSUMS] = ocp.JsonCheckpointHandler()
    options = {"enable_async_checkpointing": False, "create": False, **options}
    try:
        return ocp.CheckpointManager(
            directory, item_handlers=handlers, options=ocp.CheckpointManagerOptions(**options)
        )
    except Exception as error:  # orbax reads the metadata of all steps, and raises what JSON raises
        raise CheckpointError(
            f"{directory} must hold readable steps, got a step with damaged metadata: "
            f"{shorten(str(error), 200)} Move that step to another directory."
        ) from error


def _named(tree: Any) -> Any:
    return {BARE: tree} if jax.tree_util.treedef_is_leaf(jax.tree.structure(tree)) else tree


def _like(tree: Any, found: Any) -> Any:
    return jax.tree.unflatten(jax.tree.structure(tree), jax.tree.leaves(found))


def _name(path: Any) -> str:
    return "/".join(path_names(path))


def _listed(steps: Any) -> str:
    return ", ".join(str(step) for step in sorted(steps))


def _savable(item: str, tree: Any) -> Any:
    """Tree of arrays on the host and random keys, as orbax saves it."""

    def savable(path: Any, leaf: Any) -> Any:
        if not isinstance(
            leaf, jax.Array | np.ndarray | np.generic | int | float | complex
        ) or not np.size(leaf):
            given = f"an array of shape {np.shape(leaf)}" if hasattr(leaf, "shape") else repr(leaf)
            raise ValueError(
                f"{item} must have arrays with at least one entry, got {given} at {_name(path)}. "
                "Leave it out of the tree."
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
        raise ValueError(f"{', '.join(changed)} have other bytes than the ones saved.")


def _check_types(origin: str, item: str, saved: Any, expected: Any) -> None:
    """Check that names, shapes and dtypes of the saved leaves are the expected ones."""
    if saved is None:
        raise CheckpointError(
            f"{origin} has no {item}, or the list of its leaves is lost. Restore without {item}, "
            "or another step."
        )
    there = _types(saved)
    types = _types(expected)
    _check_names(origin, item, set(there), set(types))
    differing = [name for name, type_ in types.items() if there[name] != type_]
    if differing:
        name, *others = differing
        more = f" (and {len(others)} more leaves)" if others else ""
        raise CheckpointError(
            f"{origin} must have {item} {name} as {_shown(types[name])}, got "
            f"{_shown(there[name])}{more}. Restore it into the model that it was saved from."
        )


def _check_nodes(origin: str, item: str, saved: Any, expected: Any) -> None:
    """Check that lists, dicts and nodes without leaves of two trees are the same.

    Leaves may have equal names in different trees: adamw's state has an empty node more than
    adam's, and a list has the names of a dict with the keys "0" and "1".
    """
    _check_names(origin, item, _nodes(saved), _nodes(expected))


def _check_names(origin: str, item: str, there: set[str], expected: set[str]) -> None:
    missing = sorted(expected - there)
    surplus = sorted(there - expected)
    parts = [f"no {_few(missing)}"] * bool(missing) + [f"{_few(surplus)} as well"] * bool(surplus)
    if parts:
        source = "optimizer" if item == "optimizer_state" else "model"
        raise CheckpointError(
            f"{origin} must have the tree of {item} asked for, got {item} with "
            f"{' and '.join(parts)}. It was saved from another {source}: restore it into that one."
        )


def _few(names: list[str], most: int = 8) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _nodes(tree: Any) -> set[str]:
    """Names of leaves and of nodes without leaves; positions in lists are in brackets."""
    paths, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: not jax.tree.leaves(node)
    )
    return {
        "/".join(
            f"[{key.idx}]" if isinstance(key, jax.tree_util.SequenceKey) else path_names([key])[0]
            for key in path
        )
        for path, _ in paths
    }


def _shown(type_: tuple[tuple[int, ...], np.dtype]) -> str:
    shape, dtype = type_
    return f"{dtype}{list(shape)}"


def _types(tree: Any) -> Types:
    """Shape and dtype of every leaf by name; of random keys, those of their uint32 data."""
    types: Types = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        typed = leaf if hasattr(leaf, "dtype") else jax.typeof(leaf)
        if is_key(typed):
            typed = jax.eval_shape(
                jax.random.key_data, jax.ShapeDtypeStruct(typed.shape, typed.dtype)
            )
        types[_name(path)] = (tuple(typed.shape), np.dtype(typed.dtype))
    return types
