"""Caches that are stacked over layers, as a scan over layers has them: a leaf a layer for the ring.

Every layer's state lives on its own stage, so a leaf [layers, ...] of which a step uses one row a
layer is split into its rows, and the step is given them stacked. What is stacked only to be taken
apart leaves no operation behind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from layerwise_jax.decode.step import StepFunction, check_step_outputs, step_inputs
from layerwise_jax.trace.flatten import FORWARD_ONLY, flatten
from layerwise_jax.trace.program import Weight


@dataclass(frozen=True)
class CacheLayers:
    """Which leaves of a cache are stacked.

    Attributes:
      tree: the tree of the user's cache.
      depths: for every leaf of it, the layers that it is stacked over; None for what is not.
    """

    tree: Any
    depths: tuple[int | None, ...]

    def split(self, cache: Any) -> Any:
        """The cache with a list of rows in place of every stacked leaf, types for types.

        Raises:
          ValueError: the cache has another tree, or a leaf other layers.
        """
        leaves, tree = jax.tree.flatten(cache)
        if tree != self.tree:
            raise ValueError(f"A cache came as {tree}; {self.tree} is wanted.")
        return self._map(_rows, leaves)

    def join(self, cache: Any) -> Any:
        """The inverse of `split`."""
        return self._map(lambda rows, _: jnp.stack(rows), self.tree.flatten_up_to(cache))

    def step(self, step_fn: Callable[..., Any]) -> Callable[..., Any]:
        """A step, or a pass that reads prompts, that takes and gives split caches."""

        def split_step(params: Any, cache: Any, tokens: Any, positions: Any) -> tuple[Any, Any]:
            logits, new = step_fn(params, self.join(cache), tokens, positions)
            return logits, self.split(new)

        return split_step

    def specs(self, specs: Any) -> Any:
        """How the rows are sharded, given how the leaves are: a tree of specs, or a prefix of one.

        Raises:
          ValueError: a leaf is sharded over the layers that it is stacked over.
        """
        if specs is None:
            return None
        everywhere = jax.tree.broadcast(
            specs, self.tree.unflatten([0] * self.tree.num_leaves), is_leaf=_is_spec
        )
        return self._map(_row_specs, jax.tree.leaves(everywhere, is_leaf=_is_spec))

    def _map(self, split: Callable[[Any, int], Any], leaves: list[Any]) -> Any:
        return self.tree.unflatten(
            [
                leaf if depth is None else split(leaf, depth)
                for leaf, depth in zip(leaves, self.depths, strict=True)
            ]
        )


def find_cache_layers(
    step_fn: StepFunction, params: Any, cache: Any, num_sequences: int, axes: Mapping[str, int]
) -> CacheLayers:
    """Which leaves a step takes row by row; arguments as those of `trace_step`."""

    def step(params: Any, cache: Any, tokens: Any, positions: Any) -> Any:
        logits, new = step_fn(params, cache, tokens, positions)
        check_step_outputs("The step", logits, new, cache, num_sequences)
        held = {
            id(leaf) for leaf in jax.tree.leaves(cache)
        }  # what comes back as it was is not used whole by that
        return logits, [leaf for leaf in jax.tree.leaves(new) if id(leaf) not in held]

    tokens, positions, _ = step_inputs(num_sequences)
    jaxpr = jax.make_jaxpr(step, axis_env=list(axes.items()))(params, cache, tokens, positions)
    leaves, tree = jax.tree.flatten(cache)
    num_params = len(jax.tree.leaves(params))
    spans: dict[int, list[Weight]] = {}
    for weight in flatten(jaxpr, num_params + len(leaves), FORWARD_ONLY).weights.values():
        spans.setdefault(weight.leaf - num_params, []).append(weight)
    is_stacked = [
        all(w.start is not None and w.stop == w.start + 1 for w in spans[i])
        for i in range(len(leaves))
    ]
    return CacheLayers(
        tree,
        tuple(
            jnp.shape(leaf)[0] if stacked else None
            for leaf, stacked in zip(leaves, is_stacked, strict=True)
        ),
    )


def _rows(leaf: Any, depth: int) -> list[Any]:
    if jnp.shape(leaf)[:1] != (depth,):
        raise ValueError(
            f"A cache came with a leaf {list(jnp.shape(leaf))}; it is stacked over {depth} layers."
        )
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return [jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)] * depth
    return [lax.index_in_dim(jnp.asarray(leaf), layer, keepdims=False) for layer in range(depth)]


def _row_specs(spec: PartitionSpec | None, depth: int) -> list[PartitionSpec | None]:
    if spec and spec[0] is not None:
        raise ValueError(
            f"The cache is sharded as {spec} over the layers that it is stacked over; None is "
            "wanted there."
        )
    return [PartitionSpec(*spec[1:]) if spec else None] * depth


def _is_spec(x: Any) -> bool:
    return x is None or isinstance(x, PartitionSpec)
