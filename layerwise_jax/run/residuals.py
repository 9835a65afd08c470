"""Residuals of a VJP: those that are stashed from forward to backward, and those that are not.

A VJP's residuals are a tree of arrays. Residuals that come from weights only (a weight, a cast of
one) are equal for every microbatch: they are recomputed in the backward pass instead of stashed.
Residuals that come from the microbatch are stashed, each once; the function's own `jax.checkpoint`
policies decide which exist.

To recompute the first kind, backward traces the same VJP on zeros in place of the microbatch, and
takes from it the residuals that do not depend on them. All else of that forward is dead code, which
XLA removes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from layerwise_jax._jax import Literal, Tracer
from layerwise_jax.run.wire import from_wire, to_wire, wire_aval

# (weights, microbatch) -> (results, VJP function)
Linearized = Callable[[Any, Any], tuple[Any, Callable]]


@dataclass(frozen=True)
class Residuals:
    """The stashed residuals of one VJP.

    Attributes:
      sources: for every residual, its index among the stashed ones, or None if it is recomputed.
      avals: the types of the stashed ones.
      leaf_types: shape and dtype of every residual.
    """

    sources: tuple[int | None, ...]
    avals: tuple[Any, ...]
    leaf_types: tuple[tuple[Any, Any], ...]

    def of(self, vjp_fn: Callable) -> list[Any]:
        """The stashed residuals of a VJP function, in wire format."""
        found: dict[int, Any] = {}
        # a VJP function is a pytree whose leaves are its residuals
        leaves = jax.tree.leaves(vjp_fn)
        self._check(leaves)
        for source, leaf in zip(self.sources, leaves, strict=True):
            if source is not None:
                found.setdefault(source, to_wire(leaf))
        return [found[j] for j in range(len(self.avals))]

    def put_back(self, vjp_fn: Callable, stashed: Sequence[Any]) -> Callable:
        """The VJP function with stashed residuals in place of those it was made with."""
        leaves, tree = jax.tree.flatten(vjp_fn)
        self._check(leaves)
        values = [from_wire(x, aval) for x, aval in zip(stashed, self.avals, strict=True)]
        sources = zip(self.sources, leaves, strict=True)
        return jax.tree.unflatten(tree, [leaf if j is None else values[j] for j, leaf in sources])

    def _check(self, leaves: Sequence[Any]) -> None:
        """Two traces of one function must keep the same residuals in the same order."""
        types = tuple((x.shape, x.dtype) for x in leaves)
        assert types == self.leaf_types, f"residuals {types} of a VJP, expected {self.leaf_types}"


def find_residuals(linearized: Linearized, weights: Any, microbatch: Any) -> Residuals:
    """Trace a VJP and classify its residuals.

    Args:
      linearized: returns (results, VJP function), as `jax.vjp` does.
      weights: its arguments that are the same for every microbatch, arrays or types.
      microbatch: its other arguments, arrays or types.
    """
    closed = jax.make_jaxpr(
        lambda weights, microbatch: jax.tree.leaves(linearized(weights, microbatch)[1])
    )(weights, microbatch)
    jaxpr = closed.jaxpr
    num_weights = len(jax.tree.leaves(weights))
    # varying: values that differ between microbatches. Captured tracers (inputs, the stage index)
    # count as varying; captured constants do not.
    varying = {*jaxpr.invars[num_weights:]}
    captured = zip(jaxpr.constvars, closed.consts, strict=True)
    varying |= {x for x, value in captured if isinstance(value, Tracer)}
    # forward propagation, in the order of the trace
    for eqn in jaxpr.eqns:
        if any(not isinstance(x, Literal) and x in varying for x in eqn.invars):
            varying.update(eqn.outvars)
    places: dict[Any, int] = {}  # two residuals may be one value: it is stashed once
    sources = [
        None if isinstance(x, Literal) or x not in varying else places.setdefault(x, len(places))
        for x in jaxpr.outvars
    ]
    leaf_avals: list[Any] = [x.aval for x in jaxpr.outvars]
    leaf_types = tuple((aval.shape, aval.dtype) for aval in leaf_avals)
    return Residuals(tuple(sources), tuple(x.aval for x in places), leaf_types)


@dataclass(frozen=True)
class StashLayout:
    """Stash buffers for all stages: results, residuals of the body, residuals of segments.

    Attributes:
      results: the types of results that backward reads.
      body: the residuals of the common body, or None if there is none.
      own: for every stage, the residuals of the segment before its body.
      places: for every stage, the buffer of each of those residuals, counted behind the body's.
      own_avals: the types of those buffers, which stages share.
    """

    results: tuple[Any, ...]
    body: Residuals | None
    own: Mapping[int, Residuals]
    places: Mapping[int, tuple[int, ...]]
    own_avals: tuple[Any, ...]

    @property
    def avals(self) -> list[Any]:
        """The types of all buffers, in wire format."""
        body = () if self.body is None else self.body.avals
        return [wire_aval(aval) for aval in (*self.results, *body, *self.own_avals)]

    def split(self, stashed: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """Stashed values as (results, residuals of the body, shared buffers of segments)."""
        end_results = len(self.results)
        end_body = end_results + (0 if self.body is None else len(self.body.avals))
        return (
            list(stashed[:end_results]),
            list(stashed[end_results:end_body]),
            list(stashed[end_body:]),
        )


def share_buffers(
    own: Mapping[int, Residuals],
) -> tuple[dict[int, tuple[int, ...]], tuple[Any, ...]]:
    """Buffers that stages share by type: only one stage of a device fills them at a time.

    Returns:
      For every stage, the buffer of each residual. The types of the buffers.
    """
    avals: list[Any] = []
    places: dict[int, tuple[int, ...]] = {}
    for stage, residuals in own.items():
        taken: list[int] = []
        for aval in map(wire_aval, residuals.avals):
            # the first buffer of this type that this stage has not used yet, or a new one
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
