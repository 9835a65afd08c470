"""Conditional execution: run the one of several functions that an index selects.

The policy decides what a device pays for functions that are not its own:

    "switch"        a branch (`lax.switch`). Differentiable. XLA returns all results of a branch in
                    new buffers, so that a carry which is only passed through is copied.
    "select"        every device runs every function; `where` picks the results. No branch at all:
                    on a GPU a branch costs as much as reading tens of megabytes.
    "at_most_once"  a while loop of one iteration or none. XLA updates a loop's carry in place: no
                    copy. Not differentiable in reverse mode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

BranchPolicy = Literal["switch", "select", "at_most_once"]


def run_selected[T](
    runs: Mapping[int, Callable[[T], T]],
    index: Any,
    carry: T,
    policy: BranchPolicy,
    among: Sequence[int],
) -> T:
    """`runs[index](carry)`, or the carry if `runs` has no such key.

    Args:
      runs: functions that keep the carry's structure and types.
      index: int32 scalar, traced.
      carry: a tree of arrays.
      policy: see this module.
      among: the consecutive values that `index` can take; with one value nothing is conditional.
    """
    if len(among) == 1:  # one pipeline device: its stage is known at trace time
        run = runs.get(among[0])
        return carry if run is None else run(carry)
    if policy == "switch":
        return _switch(runs, index, carry, among)
    for key, run in runs.items():
        # One key matches at most, so the order does not matter.
        if policy == "select":
            carry = select(index == key, run(carry), carry)
        else:
            carry = run_if(index == key, run, carry)
    return carry


def _switch[T](
    runs: Mapping[int, Callable[[T], T]], index: Any, carry: T, among: Sequence[int]
) -> T:
    if not runs:
        return carry
    if len(runs) == 1:  # two branches instead of one a stage
        ((key, run),) = runs.items()
        return lax.cond(index == key, run, lambda carry: carry, carry)
    branches = [runs.get(key, lambda carry: carry) for key in among]
    return lax.switch(index - among[0], branches, carry)


def run_if[T](condition: Any, run: Callable[[T], T], carry: T) -> T:
    """`run(carry)` if the condition holds, else the carry: a while loop that runs at most once.

    `lax.cond` would copy the carry, and with it all gradient accumulators, in every tick.
    """

    def once(state: tuple[Any, T]) -> tuple[Any, T]:
        return jnp.bool_(False), run(state[1])

    # state: (is still to run, carry)
    return lax.while_loop(lambda state: state[0], once, (condition, carry))[1]


def select[T](condition: Any, new: T, old: T) -> T:
    """`new` if the condition holds, else `old`; leaves that are the same object cost nothing."""
    return jax.tree.map(lambda x, held: x if x is held else jnp.where(condition, x, held), new, old)
