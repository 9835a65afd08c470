"""Leaves of saved trees: names, types, checks against a saved tree, the form orbax takes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from layerwise_jax import processes
from layerwise_jax._jax import is_key
from layerwise_jax.trace.modules import path_names

BARE = "array"
Types = dict[str, tuple[tuple[int, ...], np.dtype]]


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or holds another tree than the one asked for."""


def named(tree: Any) -> Any:
    """The tree as orbax takes it: a bare leaf gets the name `array`."""
    return {BARE: tree} if jax.tree_util.treedef_is_leaf(jax.tree.structure(tree)) else tree


def unnamed(tree: Any, found: Any) -> Any:
    """Leaves that orbax read, in the structure of `tree`."""
    return jax.tree.unflatten(jax.tree.structure(tree), jax.tree.leaves(found))


def name_of(path: Any) -> str:
    """The name of a path in a tree: its keys joined by slashes."""
    return "/".join(path_names(path))


def savable(item: str, tree: Any) -> Any:
    """Tree of arrays on the host and random keys, as orbax saves it."""

    def savable(path: Any, leaf: Any) -> Any:
        if not isinstance(
            leaf, jax.Array | np.ndarray | np.generic | int | float | complex
        ) or not np.size(leaf):
            given = f"an array of shape {np.shape(leaf)}" if hasattr(leaf, "shape") else repr(leaf)
            raise ValueError(
                f"{item} must have arrays with at least one entry, got {given} at {name_of(path)}. "
                "Leave it out of the tree."
            )
        typed = leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
        return typed if is_key(typed) or processes.is_partial(typed) else np.asarray(typed)

    return jax.tree_util.tree_map_with_path(savable, named(tree))


def target(mesh: Mesh | None, leaf: Any) -> Any:
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


def by_name(tree: Any) -> dict[str, Any]:
    """Leaves of a tree by their names."""
    return {name_of(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def check_types(origin: str, item: str, saved: Any, expected: Any) -> None:
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
        types[name_of(path)] = (tuple(typed.shape), np.dtype(typed.dtype))
    return types
