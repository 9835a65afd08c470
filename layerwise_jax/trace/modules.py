"""Module of every parameter leaf, found from the paths of the parameter tree.

A module is an element of a repeated family (`Block_3`, `layers[3]`) or a single module (`embed`,
`head`). Containers (the root, `encoder`, a list of blocks) are split into their children. Elements
of a family are not, unless they are lists of blocks themselves (the stages of a ResNet).
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

WRAPPERS = ("value", "raw_value")


@dataclass(frozen=True)
class Module:
    """Module: its name, and whether it is a bare array (a bias, a position table)."""

    name: str
    is_bare: bool


@dataclass
class _Node:
    children: dict[str, _Node] = field(default_factory=dict)
    leaves: list[int] = field(default_factory=list)

    @property
    def is_list_of_arrays(self) -> bool:
        arrays = [name.isdigit() and not child.children for name, child in self.children.items()]
        return len(arrays) > 1 and all(arrays)

    @property
    def is_module_of_modules(self) -> bool:
        return any(child.children for child in self.children.values())


def path_names(path: Sequence[Any]) -> tuple[str, ...]:
    """Names along a key path of `jax.tree_util`, without Flax's variable wrappers."""
    names = [
        str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path
    ]
    while len(names) > 1 and names[-1] in WRAPPERS:
        names.pop()
    return tuple(names)


def modules_of(paths: Sequence[tuple[str, ...]]) -> list[Module]:
    """Module of every parameter leaf.

    Args:
      paths: names along the path to each leaf, from `path_names`.

    Returns:
      One module per leaf. Names have `/` between parts and no prefix shared by all leaves.
    """
    root = _Node()
    for leaf, path in enumerate(_without_collections(paths)):
        node = root
        for name in path:
            node = node.children.setdefault(name, _Node())
        node.leaves.append(leaf)
    names = [""] * len(paths)
    _assign(root, (), names, is_element=False, is_top=True)
    return [
        Module(name, path[-1:] == (name.split("/")[-1],))
        for name, path in zip(names, paths, strict=True)
    ]


def _without_collections(paths: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Paths without their first name where that is a collection, as in {params, batch_stats}.

    Collections hold different leaves of the same modules. Modules side by side, as in {encoder,
    decoder}, hold leaves of the same names and keep their first name.
    """
    below: dict[str, set[str]] = {}
    for path in paths:
        below.setdefault(path[0] if path else "", set()).add(path[1] if len(path) > 2 else "")
    largest = max(below.values(), key=len, default=set())
    within = [path[1:] for path in paths]
    if len(below) < 2 or not all(names <= largest for names in below.values()) or "" in largest:
        return list(paths)
    return within if len(set(within)) == len(within) else list(paths)


def _assign(
    node: _Node, prefix: tuple[str, ...], names: list[str], *, is_element: bool, is_top: bool
) -> None:
    if is_top and len(node.children) == 1 and not node.leaves:
        (child,) = node.children.values()
        if child.children:
            (name,) = node.children
            numbered = all(grandchild.isdigit() for grandchild in child.children)
            _assign(child, (name,) if numbered else prefix, names, is_element=False, is_top=True)
            return
    if not is_top and not _opens(node, is_element):
        for leaf in _leaves_below(node):
            names[leaf] = "/".join(prefix)
        return
    families = _families(node)
    for leaf in node.leaves:
        names[leaf] = "/".join(prefix) or "params"
    for name, child in node.children.items():
        _assign(child, (*prefix, name), names, is_element=families[_stem(name)] > 1, is_top=False)


def _opens(node: _Node, is_element: bool) -> bool:
    """True if a node below the root is a container, to be split into its children.

    A family's element that holds a list beside other modules (a block with attention and experts)
    is not a container.
    """
    if not is_element:
        return node.is_list_of_arrays or _holds_family(node)
    families = _families(node)
    modules = {name: child for name, child in node.children.items() if child.is_module_of_modules}
    if any(families[_stem(name)] > 1 for name in modules):
        return True
    return len(modules) == 1 and all(_is_list_of_blocks(child) for child in modules.values())


def _is_list_of_blocks(node: _Node) -> bool:
    names, blocks = list(node.children), list(node.children.values())
    return all(name.isdigit() for name in names) and all(
        block.is_module_of_modules for block in blocks
    )


def _holds_family(node: _Node) -> bool:
    """True if a node, or an only child below it, is a list of modules of one family."""
    families = _families(node)
    modules = {name: child for name, child in node.children.items() if child.children}
    if len(modules) > 1 and len({_stem(name) for name in modules}) == 1:
        return True
    for name, child in modules.items():
        if families[_stem(name)] > 1 and (child.is_module_of_modules or name.isdigit()):
            return True
        if families[_stem(name)] == 1 and _holds_family(child):
            return True
    return False


def _families(node: _Node) -> dict[str, int]:
    """Number of children per stem (a name without its number)."""
    counts: dict[str, int] = {}
    for name, child in node.children.items():
        if child.children:
            counts[_stem(name)] = counts.get(_stem(name), 0) + 1
        else:
            counts.setdefault(_stem(name), 1)
    return counts


def _stem(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _leaves_below(node: _Node) -> list[int]:
    below = [leaf for child in node.children.values() for leaf in _leaves_below(child)]
    return [*node.leaves, *below]


def captured_names(fn: Callable[..., Any], arrays: Mapping[int, Any]) -> dict[int, str]:
    """A name for every captured array: the variable and path where `fn` finds it, if there is one.

    Args:
      fn: the function.
      arrays: its captured arrays, by leaf.

    Returns:
      Names such as `frozen[0]`, or `captured 2` for an array that no variable of `fn` holds.
    """
    if not arrays:
        return {}
    found = [
        (variable + jax.tree_util.keystr(path), leaf)
        for variable, tree in _variables(fn)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
        if isinstance(leaf, jax.Array | np.ndarray)
    ]
    unnamed = (f"captured {count}" for count in range(len(arrays)))
    return {
        leaf: next((name for name, x in found if _is_same(x, array)), None) or next(unnamed)
        for leaf, array in arrays.items()
    }


def _is_same(held: Any, array: Any) -> bool:
    """True if a variable holds a captured array; JAX may copy numpy arrays, so compare values."""
    if isinstance(held, jax.Array) or isinstance(array, jax.Array):
        return held is array
    return held.shape == array.shape and np.array_equal(held, np.asarray(array))


def _variables(fn: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    """(name, value) of what a function reads: bound arguments, closure, globals, attributes."""
    while isinstance(fn, functools.partial):
        yield from fn.keywords.items()
        yield from ((f"argument {i}", value) for i, value in enumerate(fn.args))
        fn = fn.func
    fn = inspect.unwrap(fn)
    if inspect.ismethod(fn):
        yield "self", fn.__self__
        yield from getattr(fn.__self__, "__dict__", {}).items()
    if not inspect.isfunction(inspect.unwrap(getattr(fn, "__func__", fn))):
        return
    known = inspect.getclosurevars(fn)
    yield from known.nonlocals.items()
    yield from known.globals.items()
