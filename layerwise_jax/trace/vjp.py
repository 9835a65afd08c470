"""A vjp as one jaxpr, with every leaf of the vjp classified: what has to be kept for backward.

A leaf is one of

- an argument of forward: backward gets that array again, and forward does not return it;
- made from fixed arguments and constants only: backward recomputes it (transposed weights);
- anything else: stashed, each array once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from layerwise_jax import _jax


class Leaf(NamedTuple):
    """Source of a leaf of the vjp in backward: its group, and the place in that group.

    Groups: "argument" (an argument of forward), "recomputed", "stashed".
    """

    kind: Literal["argument", "recomputed", "stashed"]
    place: int


@dataclass(frozen=True, eq=False)
class Linearization:
    """A stage's forward and vjp as one jaxpr.

    Attributes:
      jaxpr: (stage arguments, flat) to (results, then leaves of the vjp, flat).
      num_results: how many of the jaxpr's results are the stage's.
      tree: the structure of the vjp.
      leaves: where backward finds each leaf of the vjp.
      stashed: the jaxpr's results that are stashed, by position.
      recomputed: the jaxpr's results that backward recomputes.
      avals: the types of what is stashed.
    """

    jaxpr: Any
    num_results: int
    tree: Any
    leaves: tuple[Leaf, ...]
    stashed: tuple[int, ...]
    recomputed: tuple[int, ...]
    avals: tuple[Any, ...]


def classify_leaves(closed: Any, num_results: int, tree: Any, num_fixed: int) -> Linearization:
    """Classify the leaves of a vjp by how backward gets them.

    The first `num_fixed` arguments are the same for every microbatch: what depends only on them is
    recomputed, arguments are passed again, and the rest is stashed.
    """
    jaxpr = closed.jaxpr
    arguments = {x: j for j, x in enumerate(jaxpr.invars)}
    moving = set(jaxpr.invars[num_fixed:])
    for eqn in jaxpr.eqns:
        if any(not isinstance(x, _jax.Literal) and x in moving for x in eqn.invars):
            moving.update(eqn.outvars)
    stashed: dict[Any, int] = {}  # variable to its place in the stash
    positions: list[int] = []
    recomputed: list[int] = []
    leaves = []
    for position, x in enumerate(jaxpr.outvars[num_results:], start=num_results):
        if not isinstance(x, _jax.Literal) and x in arguments:
            leaves.append(Leaf("argument", arguments[x]))
        elif isinstance(x, _jax.Literal) or x not in moving:
            leaves.append(Leaf("recomputed", len(recomputed)))
            recomputed.append(position)
        else:
            if x not in stashed:
                stashed[x] = len(stashed)
                positions.append(position)
            leaves.append(Leaf("stashed", stashed[x]))
    avals = tuple(x.aval for x in stashed)
    return Linearization(
        closed, num_results, tree, tuple(leaves), tuple(positions), tuple(recomputed), avals
    )


def run_part(closed: Any, wanted: Sequence[int], arguments: Sequence[Any]) -> list[Any]:
    """Evaluate the results at positions `wanted`, which depend only on the first arguments.

    Only the equations behind them run.
    """
    jaxpr = closed.jaxpr
    outvars = [jaxpr.outvars[position] for position in wanted]
    needed = {x for x in outvars if not isinstance(x, _jax.Literal)}
    eqns = []
    for eqn in reversed(jaxpr.eqns):
        if not needed.isdisjoint(eqn.outvars):
            eqns.append(eqn)
            needed.update(x for x in eqn.invars if not isinstance(x, _jax.Literal))
    known = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    known |= dict(zip(jaxpr.invars[: len(arguments)], arguments, strict=True))

    def read(x: Any) -> Any:
        return x.val if isinstance(x, _jax.Literal) else known[x]

    for eqn in reversed(eqns):
        known.update(zip(eqn.outvars, _jax.bind(eqn, [read(x) for x in eqn.invars]), strict=True))
    return [read(x) for x in outvars]
