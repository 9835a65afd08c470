"""Names of the arrays that a function closes over."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np


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
    """Whether a variable holds a captured array; JAX may copy arrays of numpy."""
    if isinstance(held, jax.Array) or isinstance(array, jax.Array):
        return held is array
    return held.shape == array.shape and np.array_equal(held, np.asarray(array))


def _variables(fn: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    """(name, value) of what a function reads besides its arguments."""
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
