"""Caches stacked over layers, as a scan over layers has them: split into one leaf a layer.

Each layer's state is on its own stage. A leaf [layers, ...] of which every layer uses one slice is
split into these slices, and the step gets them stacked again. The stacking leaves no operation,
since the step takes it apart at once.
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
from layerwise_jax.trace.flatten import flatten
from layerwise_jax.trace.flatten_policy import FORWARD_ONLY
from layerwise_jax.trace.program import Weight


@dataclass(frozen=True)
class CacheLayers:
    """The stacked leaves of a cache.

    Attributes:
      tree: the tree of the user's cache.
      depths: for every leaf, the number of layers that it is stacked over; None if it is not.
    """

    tree: Any
    depths: tuple[int | None, ...]

    def split(self, cache: Any) -> Any:
        """The cache with every stacked leaf [layers, ...] as a list of layers' slices [...]. Types
        give types.

        Raises:
          ValueError: the cache has another tree, or a leaf another number of layers.
        """
        leaves, tree = jax.tree.flatten(cache)
        if tree != self.tree:
            raise ValueError(f"A cache must have the tree {self.tree}, got {tree}.")
        return self._map(_slices, leaves)

    def join(self, cache: Any) -> Any:
        """The inverse of `split`."""
        return self._map(lambda slices, _: jnp.stack(slices), self.tree.flatten_up_to(cache))

    def step(self, step_fn: Callable[..., Any]) -> Callable[..., Any]:
        """The step, or the function that reads prompts, over split caches."""

        def split_step(params: Any, cache: Any, tokens: Any, positions: Any) -> tuple[Any, Any]:
            logits, new = step_fn(params, self.join(cache), tokens, positions)
            return logits, self.split(new)

        return split_step

    def specs(self, specs: Any) -> Any:
        """Specs of the split cache, given those of the user's: a tree, or a prefix of one.

        Raises:
          ValueError: a leaf is sharded over its axis of layers.
        """
        if specs is None:
            return None
        # Zeros stand for leaves: only the structure counts.
        leaves = self.tree.unflatten([0] * self.tree.num_leaves)
        everywhere = jax.tree.broadcast(specs, leaves, is_leaf=_is_spec)
        return self._map(_slice_specs, jax.tree.leaves(everywhere, is_leaf=_is_spec))

    def _map(self, split: Callable[[Any, int], Any], leaves: list[Any]) -> Any:
        pairs = zip(leaves, self.depths, strict=True)
        return self.tree.unflatten(
            [leaf if depth is None else split(leaf, depth) for leaf, depth in pairs]
        )


def find_cache_layers(
    step_fn: StepFunction, params: Any, cache: Any, num_sequences: int, axes: Mapping[str, int]
) -> CacheLayers:
    """The leaves of which a step uses one slice a layer; arguments as those of `trace_step`."""

    def step(params: Any, cache: Any, tokens: Any, positions: Any) -> Any:
        logits, new = step_fn(params, cache, tokens, positions)
        check_step_outputs("step_fn", logits, new, cache, num_sequences)
        # A leaf that is returned unchanged would count as a use of the whole leaf: left out.
        held = {id(leaf) for leaf in jax.tree.leaves(cache)}
        return logits, [leaf for leaf in jax.tree.leaves(new) if id(leaf) not in held]

    tokens, positions, _ = step_inputs(num_sequences)
    jaxpr = jax.make_jaxpr(step, axis_env=list(axes.items()))(params, cache, tokens, positions)
    leaves, tree = jax.tree.flatten(cache)
    num_params = len(jax.tree.leaves(params))
    program = flatten(jaxpr, num_params + len(leaves), FORWARD_ONLY)
    # The parts of each leaf that operations use: (leaf, start, stop), or the whole leaf.
    uses: dict[int, list[Weight]] = {}
    for weight in program.weights.values():
        uses.setdefault(weight.leaf - num_params, []).append(weight)
    # One slice [start, start + 1) a use, and never the whole leaf.
    is_stacked = [
        # Stacked: every use is a slice of one layer.
        all(w.start is not None and w.stop == w.start + 1 for w in uses[i])
        for i in range(len(leaves))
    ]
    pairs = zip(leaves, is_stacked, strict=True)
    return CacheLayers(tree, tuple(jnp.shape(x)[0] if stacked else None for x, stacked in pairs))


def _slices(leaf: Any, depth: int) -> list[Any]:
    shape = jnp.shape(leaf)
    if shape[:1] != (depth,):
        raise ValueError(
            f"A cache leaf that is stacked over {depth} layers must have shape [{depth}, ...], got "
            f"{list(shape)}."
        )
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return [jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)] * depth
    return [lax.index_in_dim(jnp.asarray(leaf), layer, keepdims=False) for layer in range(depth)]


def _slice_specs(spec: PartitionSpec | None, depth: int) -> list[PartitionSpec | None]:
    if spec and spec[0] is not None:
        raise ValueError(
            "cache_specs must not shard the axis of layers of a stacked leaf, got "
            f"{spec}. Pass PartitionSpec(None, ...)."
        )
    return [PartitionSpec(*spec[1:]) if spec else None] * depth


def _is_spec(x: Any) -> bool:
    return x is None or isinstance(x, PartitionSpec)
