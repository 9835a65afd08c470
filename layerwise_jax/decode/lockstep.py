"""Lockstep leaves: cache leaves [sequences, ...] that are equal for all sequences of a group.

Flax's `end_index` is one: a counter a sequence, of which the step reads the first. All sequences of
a group share it, so the ring holds one entry and the step is given it spread over the sequences.
Following spread values (`trace/spread.py`) proves that the step keeps such a leaf equal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from layerwise_jax.batch.analysis import BatchError
from layerwise_jax.decode.cache import CacheLayers, find_cache_layers
from layerwise_jax.decode.independence import check_independence
from layerwise_jax.decode.step import StepFunction, step_inputs
from layerwise_jax.trace.spread import Spread, run_spread, whole


@dataclass(frozen=True)
class LockstepLeaves:
    """The lockstep leaves of a cache.

    Attributes:
      tree: the tree of the cache.
      leaves: numbers of the lockstep leaves.
      names: paths of all leaves.
      num_sequences: sequences of a group.
    """

    tree: Any
    leaves: frozenset[int]
    names: tuple[str, ...]
    num_sequences: int

    @classmethod
    def none(cls, cache: Any, num_sequences: int) -> LockstepLeaves:
        """No leaf of a cache."""
        paths, tree = jax.tree_util.tree_flatten_with_path(cache)
        names = tuple(jax.tree_util.keystr(path) for path, _ in paths)
        return cls(tree, frozenset(), names, num_sequences)

    def split(self, cache: Any) -> Any:
        """The cache with one entry [...] for every lockstep leaf [sequences, ...]; types give
        types.

        Raises:
          ValueError: the entries of such a leaf differ.
        """
        leaves = enumerate(self.tree.flatten_up_to(cache))
        return self.tree.unflatten(
            [self._entry(i, x) if i in self.leaves else x for i, x in leaves]
        )

    def join(self, cache: Any) -> Any:
        """The inverse of `split`."""
        return jax.tree.map(whole, self._spread(cache, self.num_sequences))

    def step(self, step_fn: StepFunction) -> StepFunction:
        """The step, or the function that reads prompts, over split caches."""
        if not self.leaves:
            return step_fn

        def shared_step(params: Any, cache: Any, tokens: Any, positions: Any) -> tuple[Any, Any]:
            # The batch analysis traces with other numbers of sequences: not `num_sequences`.
            held = self._spread(cache, jnp.shape(tokens)[0])
            logits, new = run_spread(step_fn, params, held, tokens, positions)
            if jax.tree.structure(new) == self.tree:  # else the caller refuses it
                values = enumerate(jax.tree.leaves(new))
                new = [self._new(i, x) if i in self.leaves else x for i, x in values]
                new = self.tree.unflatten(new)
            return jax.tree.map(whole, (logits, new))

        return shared_step

    def specs(self, specs: Any) -> Any:
        """Specs of the split cache: a tree, or a prefix of one.

        Raises:
          ValueError: a lockstep leaf is sharded.
        """
        if specs is None or not self.leaves:
            return specs
        # Names stand for leaves: any tree of the same structure does.
        everywhere = jax.tree.broadcast(specs, self.tree.unflatten(self.names), is_leaf=_is_spec)
        leaves = jax.tree.leaves(everywhere, is_leaf=_is_spec)
        for i in self.leaves:
            if leaves[i] is not None and any(leaves[i]):
                raise ValueError(
                    f"cache_specs must not shard {self.names[i]}, which all sequences share, got "
                    f"{leaves[i]}. Pass PartitionSpec()."
                )
        kept = [PartitionSpec() if i in self.leaves else x for i, x in enumerate(leaves)]
        return self.tree.unflatten(kept)

    def _spread(self, cache: Any, size: int) -> Any:
        leaves = enumerate(self.tree.flatten_up_to(cache))
        return self.tree.unflatten([Spread(x, size) if i in self.leaves else x for i, x in leaves])

    def _entry(self, i: int, leaf: Any) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            # [sequences, ...] -> [...]: one entry stands for all sequences of a group.
            return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
        if not _is_even(leaf):
            raise ValueError(
                f"caches must have one value for all sequences of a group at {self.names[i]}, got "
                f"{np.asarray(leaf).tolist()}. step_fn reads it of one sequence: group sequences "
                "of equal length."
            )
        return leaf[0]

    def _new(self, i: int, value: Any) -> Any:
        if not isinstance(value, Spread):
            raise ValueError(
                f"prefill_fn must keep cache{self.names[i]} equal for all sequences, got values "
                "that depend on the sequence. step_fn reads it of one sequence: advance it by "
                "prefill_length, or leave prefill_fn out."
            )
        return value.entry


@dataclass(frozen=True)
class CacheForm:
    """The ring's form of a user's cache: split by layers, then one entry a lockstep leaf."""

    layers: CacheLayers
    lockstep: LockstepLeaves

    def split(self, cache: Any) -> Any:
        """The user's cache in the ring's form; types give types."""
        return self.lockstep.split(self.layers.split(cache))

    def checked(self, cache: Any, first: Any) -> Any:
        """A group's cache in the ring's form, which must have the types of the first cache.

        Raises:
          ValueError: a leaf of another type, by name.
        """
        split = self.split(cache)
        given = jax.tree_util.tree_leaves_with_path(split)
        for (path, leaf), held in zip(given, jax.tree.leaves(first), strict=True):
            got, expected = (f"{jnp.result_type(x)}{list(jnp.shape(x))}" for x in (leaf, held))
            if got != expected:
                name = jax.tree_util.keystr(path)
                raise ValueError(f"caches must have {expected} at {name}, got {got}.")
        return split

    def join(self, cache: Any) -> Any:
        """The inverse of `split`."""
        return self.layers.join(self.lockstep.join(cache))

    def step(self, step_fn: StepFunction) -> StepFunction:
        """The user's step, or function that reads prompts, over caches in the ring's form."""
        return self.lockstep.step(self.layers.step(step_fn))

    def specs(self, specs: Any) -> Any:
        """Specs of the ring's form, given those of the user's cache."""
        return self.lockstep.specs(self.layers.specs(specs))


def find_cache_form(
    step_fn: StepFunction,
    params: Any,
    shards: Any,
    num_sequences: int,
    axes: Mapping[str, int],
    cache: Any,
) -> CacheForm:
    """The ring's form of a cache.

    Leaves are in lockstep only where the step mixes sequences otherwise: a group with such a leaf
    starts and ends together, while independent sequences start and end one by one.

    Args:
      step_fn: the user's step.
      params: types of one device's parameters.
      shards: types of one device's part of a group's cache.
      num_sequences: sequences of a group.
      axes: sizes of the mesh axes over which the step has collectives, by name.
      cache: the cache of a group before its first token, arrays or types.
    """
    layers = find_cache_layers(step_fn, params, shards, num_sequences, axes)
    step = layers.step(step_fn)
    shards = layers.split(shards)
    # Two groups stand for any number of them.
    none = LockstepLeaves.none(shards, num_sequences)
    try:
        cache = layers.split(cache)
    except ValueError:  # sharded over its layers, which `specs` refuses by name
        return CacheForm(layers, none)

    def is_independent(step: StepFunction, shards: Any) -> bool:
        try:
            return check_independence(step, params, shards, num_sequences, 2, axes=axes)
        except BatchError:
            return False

    found = find_lockstep_leaves(step, params, shards, num_sequences, axes, cache)
    if not found.leaves or is_independent(step, shards):
        return CacheForm(layers, none)
    # Sharing a counter is of use only if nothing else mixes sequences.
    helps = is_independent(found.step(step), found.split(shards))
    return CacheForm(layers, found if helps else none)


def find_lockstep_leaves(
    step_fn: StepFunction,
    params: Any,
    shards: Any,
    num_sequences: int,
    axes: Mapping[str, int],
    cache: Any,
) -> LockstepLeaves:
    """The integer leaves [sequences, ...] that start equal and that the step keeps equal.

    Arguments are those of `find_cache_form`, with the cache split by layers.
    """
    found = LockstepLeaves.none(cache, num_sequences)
    # Assume that all candidates stay equal, and drop those that do not.
    candidates = [i for i, x in enumerate(jax.tree.leaves(cache)) if _may_be(x, num_sequences)]
    # Start from all candidates and drop those that the step does not keep equal.
    found = replace(found, leaves=frozenset(candidates))
    tokens, positions, _ = step_inputs(num_sequences)
    while found.leaves:
        kept: list[int] = []

        def probe(
            params: Any, shards: Any, *inputs: Any, found: LockstepLeaves = found, kept: list = kept
        ) -> None:
            entries = enumerate(jax.tree.leaves(shards))
            # Trace only: `probe` collects what stays a Spread and returns nothing.
            held = [Spread(x[0], num_sequences) if i in found.leaves else x for i, x in entries]
            _, new = run_spread(step_fn, params, found.tree.unflatten(held), *inputs)
            kept += [i for i, x in enumerate(jax.tree.leaves(new)) if isinstance(x, Spread)]

        jax.make_jaxpr(probe, axis_env=list(axes.items()))(params, shards, tokens, positions)
        if found.leaves <= frozenset(kept):
            break
        # A leaf may follow from one that is not kept equal: look again without that.
        found = replace(found, leaves=found.leaves & frozenset(kept))
    return found


def _may_be(leaf: Any, num_sequences: int) -> bool:
    """True for a counter a sequence, an integer [sequences] or [sequences, 1], that starts equal.

    Larger integer leaves are quantised caches, which no step keeps equal.
    """
    shape = jnp.shape(leaf)
    is_counter = shape[:1] == (num_sequences,) and math.prod(shape[1:]) == 1
    return is_counter and jnp.issubdtype(jnp.result_type(leaf), jnp.integer) and _is_even(leaf)


def _is_even(leaf: Any) -> bool:
    """True if all entries along the first axis are equal; a type means zeros."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return True
    values = np.asarray(leaf)
    return bool((values == values[:1]).all())


def _is_spec(x: Any) -> bool:
    return x is None or isinstance(x, PartitionSpec)
