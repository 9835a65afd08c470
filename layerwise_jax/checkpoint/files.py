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
from jax.sharding import Mesh

from layerwise_jax import processes
from layerwise_jax._arguments import checked_int
from layerwise_jax.checkpoint.checksums import checksums
from layerwise_jax.checkpoint.leaves import (
    CheckpointError,
    _check_nodes,
    by_name,
    check_types,
    named,
    savable,
    target,
    unnamed,
)

try:
    import orbax.checkpoint as ocp
except ImportError as error:
    raise ImportError(
        "Checkpoints are written by orbax: install layerwise-jax[checkpoint]."
    ) from error
"""Name on disk of a tree that is a single array."""
CHECKSUMS = "checksums"
DOOMED = "0.orbax-checkpoint-tmp-deleted"
"""Directory of steps to delete; orbax cleans up directories named so, and reads none of them."""


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
    """Open a manager that writes steps with these items; deletes what killed saves left."""
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
    items = {item: savable(item, tree) for item, tree in trees.items() if jax.tree.leaves(tree)}
    sums = {item: checksums(by_name(tree)) for item, tree in items.items()}
    saves: dict[str, Any] = {item: ocp.args.StandardSave(tree) for item, tree in items.items()}
    saves[CHECKSUMS] = ocp.args.JsonSave(sums)
    saved = orbax.save(operator.index(step), args=ocp.args.Composite(**saves))
    assert saved, "orbax skipped the latest step"
    _delete_doomed(directory=Path(orbax.directory))


def _delete_doomed(directory: Path) -> None:
    """Delete the steps that orbax moved to `DOOMED` because `keep` newer ones exist."""
    # orbax itself deletes file by file under the step's name: a kill would leave half a step.
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
    wanted = {item: named(tree) for item, tree in trees.items() if jax.tree.leaves(tree)}
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
        item: unnamed(tree, found[item]) if item in wanted else tree for item, tree in trees.items()
    }


def _restore(
    orbax: ocp.CheckpointManager, step: int, wanted: Mapping[str, Any], mesh: Mesh | None
) -> Any:
    saved = orbax.item_metadata(step)
    for item, tree in wanted.items():
        check_types(f"Step {step} of {orbax.directory}", item, saved.get(item), tree)
    restores = {
        item: ocp.args.StandardRestore(jax.tree.map(partial(target, mesh), tree))
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


def _listed(steps: Any) -> str:
    return ", ".join(str(step) for step in sorted(steps))


def _check_sums(tree: Any, wanted: Mapping[str, int]) -> None:
    if changed := [
        name for name, checksum in checksums(by_name(tree)).items() if wanted[name] != checksum
    ]:
        raise ValueError(f"{', '.join(changed)} have other bytes than the ones saved.")
