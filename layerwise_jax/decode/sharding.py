"""Sharding of parameters and cache inside a stage, over the mesh axes other than `stage`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from layerwise_jax.mesh import STAGE
from layerwise_jax.stage.placement import Placement


@dataclass(frozen=True, eq=False)
class InnerSharding:
    """Types of the whole parameters and cache, and of one device's shards.

    Attributes:
      axes: sizes of the mesh axes other than `stage`, by name.
      specs: the spec of every leaf of (parameters, cache) over these axes.
      params: types of the whole parameters.
      shards: types of (parameters, cache) on one device.
    """

    axes: Mapping[str, int]
    specs: tuple[PartitionSpec, ...]
    params: Any
    shards: tuple[Any, Any]

    @classmethod
    def of(cls, mesh: Mesh | None, whole: tuple[Any, Any], specs: tuple[Any, Any]) -> InnerSharding:
        """The sharding of (parameters, cache) by a tree of specs each, or a prefix of one; None
        shards nothing.

        Raises:
          ValueError: a spec names an axis that the mesh lacks, or `stage`, or does not divide its
            leaf.
        """
        sizes = {} if mesh is None else dict(mesh.shape)
        axes = {name: size for name, size in sizes.items() if name != STAGE}
        # One spec a leaf, parameters first.
        flat = [
            spec for tree, part in zip(specs, whole, strict=True) for spec in _broadcast(tree, part)
        ]
        leaves, tree = jax.tree.flatten(whole)
        shards = [_shard(leaf, spec, axes) for leaf, spec in zip(leaves, flat, strict=True)]
        params = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), whole[0]
        )
        return cls(axes, tuple(flat), params, jax.tree.unflatten(tree, shards))

    @property
    def num_params(self) -> int:
        """Leaves of the parameters."""
        return len(jax.tree.leaves(self.params))

    def check(self, params: Any) -> list[Any]:
        """The leaves of `params`, which must have the types that were traced.

        Raises:
          ValueError: another tree, or a leaf of another shape or dtype, by name.
        """
        # Paths are for the error only.
        leaves, tree = jax.tree_util.tree_flatten_with_path(params)
        avals, traced_tree = jax.tree.flatten(self.params)
        if tree != traced_tree:
            raise ValueError(
                "params must have the tree that the ring was made with.\n"
                f"  expected: {traced_tree}\n  got:      {tree}"
            )
        for (path, leaf), aval in zip(leaves, avals, strict=True):
            if (jnp.shape(leaf), jnp.result_type(leaf)) != (aval.shape, aval.dtype):
                raise ValueError(
                    f"params{jax.tree_util.keystr(path)} must be {aval.dtype}{list(aval.shape)}, "
                    f"got {jnp.result_type(leaf)}{list(jnp.shape(leaf))}."
                )
        return [leaf for _, leaf in leaves]

    def shard_slots(self, placement: Placement) -> Placement:
        """The placement with the spec of every slot.

        Raises:
          ValueError: weights that share a slot on different stages are sharded differently.
        """
        slots = []
        for slot in placement.slots:
            # A slot is one array over all stages, so it has one spec.
            # A slot is one array over all stages, so it has one spec.
            specs = {self.specs[weight.leaf] for weight in slot.weights if weight is not None}
            if len(specs) > 1:
                raise ValueError(
                    f"param_specs must shard {slot.name} alike on all stages, got {specs}."
                )
            slots.append(replace(slot, spec=next(iter(specs))))
        return replace(placement, slots=tuple(slots))


def _broadcast(specs: Any, tree: Any) -> Sequence[PartitionSpec]:
    def is_spec(x: Any) -> bool:
        return x is None or isinstance(x, PartitionSpec)

    try:
        return [
            spec or PartitionSpec()
            for spec in jax.tree.leaves(
                jax.tree.broadcast(specs, tree, is_leaf=is_spec), is_leaf=is_spec
            )
        ]
    except ValueError as error:
        raise ValueError(
            f"Specs must have the tree of what they shard, or be a prefix of it: {error}"
        ) from error


def _shard(leaf: Any, spec: PartitionSpec, axes: Mapping[str, int]) -> jax.ShapeDtypeStruct:
    """The type of one device's shard."""
    # A spec may be shorter than the shape: the rest is not sharded.
    shape = list(jnp.shape(leaf))
    for dimension, entry in enumerate(spec):
        # An entry of a spec is None, one axis name, or a tuple of names.
        names = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        unknown = [name for name in names if name not in axes]
        if unknown or dimension >= len(shape):
            raise ValueError(
                f"A spec for an array of shape {shape} must name the mesh axes {list(axes)}, at "
                f"most one entry a dimension, got {spec}."
            )
        # A dimension may be sharded over several axes together.
        ways = math.prod(axes[name] for name in names)
        if shape[dimension] % ways:
            raise ValueError(
                f"A spec must divide its array, got {spec} for shape {shape}: dimension {dimension}"
                f" does not split {ways} ways."
            )
        shape[dimension] //= ways
    return jax.ShapeDtypeStruct(tuple(shape), jnp.result_type(leaf))
