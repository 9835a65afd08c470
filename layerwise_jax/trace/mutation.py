"""Variables that a function mutates: found by its trace, and returned as additional outputs.

An nnx module is a tree of `nnx.Variable`. Calling it may give some of them new values: counts of
its random streams, batch statistics, caches. `nnx.jit` writes these back into the caller's module.
Here the traced function returns them beside its outputs, so that a pipeline can carry them as state
or refuse the function.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

KeyPath = tuple[Any, ...]


@dataclass(frozen=True)
class WithMutations:
    """`fn`, returning (outputs, {leaf of the parameters: its new value}).

    Raises, when it is called under a trace:
      ValueError: `fn` adds or removes a Variable, or mutates one of its inputs; the message names
        the Variable.
    """

    fn: Callable[..., Any]

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """`fn`, whose signature this has."""
        return self.fn

    def __call__(self, params: Any, *inputs: Any) -> tuple[Any, dict[int, Any]]:
        before, tree = jax.tree.flatten(params)
        inputs_before = jax.tree.leaves(inputs)
        outputs = self.fn(params, *inputs)
        after, tree_after = jax.tree.flatten(params)
        if tree_after != tree:
            raise ValueError(_other_variables(tree, tree_after))
        self._check_inputs(inputs, inputs_before)
        pairs = enumerate(zip(before, after, strict=True))
        return outputs, {leaf: new for leaf, (old, new) in pairs if new is not old}

    def _check_inputs(self, inputs: Any, before: list[Any]) -> None:
        after = jax.tree_util.tree_flatten_with_path(inputs)[0]
        if len(after) == len(before):
            changed = [
                path for (path, new), old in zip(after, before, strict=True) if new is not old
            ]
        else:
            changed = [path for path, _ in after]
        if changed:
            raise ValueError(
                f"fn must not mutate its inputs, got a new value of input{_name(changed[0])}. Pass "
                "the object that holds this Variable as part of the parameters, with "
                "state='mutated'."
            )


def with_mutations(fn: Callable[..., Any], params: Any, inputs: Any) -> WithMutations | None:
    """`fn` with what it mutates among its outputs; None where no argument holds a Variable.

    Raises:
      ValueError: one Variable is at two paths of the parameters, where JAX would make two of it.
    """
    variable = _variable_type()
    if variable is None:
        return None

    def is_variable(x: Any) -> bool:
        return isinstance(x, variable)

    found = jax.tree_util.tree_flatten_with_path((params, inputs), is_leaf=is_variable)[0]
    variables = [(path[1:], leaf) for path, leaf in found if is_variable(leaf)]
    seen: dict[int, KeyPath] = {}
    for path, leaf in variables:
        if id(leaf) in seen:
            raise ValueError(
                f"Every Variable must be at one path of the parameters, got one at "
                f"{_name(seen[id(leaf)])} and {_name(path)}. Pass its state instead: "
                "graph, state = nnx.split(module), with a function that calls "
                "nnx.merge(graph, state)."
            )
        seen[id(leaf)] = path
    return WithMutations(fn) if variables else None


def call_unmutated(fn: Callable[..., Any], params: Any, *inputs: Any) -> Any:
    """Call `fn` under a trace and refuse it if it gives Variables of its parameters new values.

    Raises:
      ValueError: naming the Variables.
    """
    before = jax.tree_util.tree_flatten_with_path(params)[0]
    outputs = fn(params, *inputs)
    after = jax.tree.leaves(params)
    if _variable_type() is not None and len(after) == len(before):
        pairs = zip(before, after, strict=True)
        if changed := [_name(path) for (path, old), new in pairs if new is not old]:
            raise ValueError(
                f"The step must not mutate its parameters, got new values of {', '.join(changed)}. "
                "Put what changes into the cache and return it, or use the module in evaluation "
                "mode."
            )
    return outputs


def _variable_type() -> type | None:
    """`nnx.Variable`, if anything has imported flax.nnx."""
    nnx = sys.modules.get("flax.nnx")
    return None if nnx is None else nnx.Variable


def _other_variables(before: Any, after: Any) -> str:
    """The refusal of a function that changes the tree of its parameters."""
    old, new = _names_of(before), _names_of(after)
    added, removed = sorted(new - old), sorted(old - new)
    what = f"adds {', '.join(added)}" if added else f"removes {', '.join(removed)}"
    if not added and not removed:
        what = "changes their structure"
    return (
        f"fn must leave the Variables of its parameters in place, but it {what}. Return that value "
        "from fn instead, or create the Variable before fn is staged."
    )


def _names_of(tree: Any) -> set[str]:
    leaves = jax.tree.unflatten(tree, range(tree.num_leaves))
    return {_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(leaves)[0]}


def _name(path: KeyPath) -> str:
    return jax.tree_util.keystr(path)
