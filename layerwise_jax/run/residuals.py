"""What a vjp keeps from forward to backward, and how little of that has to be stashed.

A vjp's residuals are a tree of arrays. Those that come from the weights alone (the weights
themselves, or a cast of them) are the same for every microbatch: backward makes them again and
nothing stashes them. Those that come from the microbatch are stashed, each once, whatever the
function's own `jax.checkpoint` policy leaves of them.

To make the first kind again, backward traces the same vjp on zeros in place of the microbatch and
takes from it what does not depend on them; all else of that forward is dead code, which the
compiler removes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from layerwise_jax._jax import Literal, Tracer
from layerwise_jax.run.wire import from_wire, to_wire, wire_aval

# (weights, microbatch) to (results, pull).
Linearized = Callable[[Any, Any], tuple[Any, Callable]]


@dataclass(frozen=True)
class Residuals:
    """Which of a vjp's residuals are stashed.

    Attributes:
      sources: for every residual, its place among the stashed ones, or None if it is made again.
      avals: the types of the stashed ones.
    """

    sources: tuple[int | None, ...]
    avals: tuple[Any, ...]

    def of(self, pull: Callable) -> list[Any]:
        """What is to be stashed of a vjp."""
        found: dict[int, Any] = {}
        for source, leaf in zip(self.sources, jax.tree.leaves(pull), strict=True):
            if source is not None:
                found.setdefault(source, to_wire(leaf))
        return [found[j] for j in range(len(self.avals))]

    def put_back(self, pull: Callable, stashed: Sequence[Any]) -> Callable:
        """The vjp with what was stashed in the place of its own residuals."""
        leaves, tree = jax.tree.flatten(pull)
        values = [from_wire(x, aval) for x, aval in zip(stashed, self.avals, strict=True)]
        sources = zip(self.sources, leaves, strict=True)
        return jax.tree.unflatten(tree, [leaf if j is None else values[j] for j, leaf in sources])


def find_residuals(linearized: Linearized, weights: Any, microbatch: Any) -> Residuals:
    """The residuals of a vjp, by tracing it.

    Args:
      linearized: gives (results, pull) as `jax.vjp` does.
      weights: what it takes that is the same for every microbatch, arrays or types.
      microbatch: what it takes besides, likewise.
    """
    # What the function reads without being given it stays the same too, unless it is traced:
    # inputs, the stage.
    closed = jax.make_jaxpr(
        lambda weights, microbatch: jax.tree.leaves(linearized(weights, microbatch)[1])
    )(weights, microbatch)
    jaxpr = closed.jaxpr
    num_weights = len(jax.tree.leaves(weights))
    moving = {*jaxpr.invars[num_weights:]}
    moving |= {
        x
        for x, value in zip(jaxpr.constvars, closed.consts, strict=True)
        if isinstance(value, Tracer)
    }
    for eqn in jaxpr.eqns:
        if any(not isinstance(x, Literal) and x in moving for x in eqn.invars):
            moving.update(eqn.outvars)
    places: dict[Any, int] = {}
    sources = [
        None if isinstance(x, Literal) or x not in moving else places.setdefault(x, len(places))
        for x in jaxpr.outvars
    ]
    return Residuals(tuple(sources), tuple(x.aval for x in places))


@dataclass(frozen=True)
class StashLayout:
    """Buffers for the residuals of all stages: the common body's first, then those of what stages
    have of their own.

    Attributes:
      results: the types of results that backward reads.
      body: the residuals of the common body, or None if there is none.
      own: the residuals of every stage's own operations.
      places: for every stage, in which buffer after the common ones each of its own residuals goes.
      own_avals: the types of those buffers, which stages share.
    """

    results: tuple[Any, ...]
    body: Residuals | None
    own: Mapping[int, Residuals]
    places: Mapping[int, tuple[int, ...]]
    own_avals: tuple[Any, ...]

    @property
    def avals(self) -> list[Any]:
        """All buffers' types, as they are held."""
        body = () if self.body is None else self.body.avals
        return [wire_aval(aval) for aval in (*self.results, *body, *self.own_avals)]

    def split(self, stashed: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """What was stashed of results, of the body, and of a stage's own operations."""
        first = len(self.results)
        second = first + (0 if self.body is None else len(self.body.avals))
        return list(stashed[:first]), list(stashed[first:second]), list(stashed[second:])


def share_buffers(
    own: Mapping[int, Residuals],
) -> tuple[dict[int, tuple[int, ...]], tuple[Any, ...]]:
    """A buffer for every stage's residuals, stages sharing those of a type: (places by stage, the
    buffers' types).
    """
    avals: list[Any] = []
    places = {}
    for stage, residuals in own.items():
        taken: list[int] = []
        for aval in map(wire_aval, residuals.avals):
            fits = (
                j for j, other in enumerate(avals) if j not in taken and _same_type(other, aval)
            )
            place = next(fits, len(avals))
            if place == len(avals):
                avals.append(aval)
            taken.append(place)
        places[stage] = tuple(taken)
    return places, tuple(avals)


def _same_type(a: Any, b: Any) -> bool:
    return (a.shape, a.dtype) == (b.shape, b.dtype)
