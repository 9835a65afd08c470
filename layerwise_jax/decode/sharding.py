"""How parameters and cache are sharded inside a stage, over axes of the mesh besides `stage`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from layerwise_jax.mesh import STAGE
from layerwise_jax.stage.placement import Placement


@dataclass(frozen=True, eq=False)
class InnerSharding:
    """Whole parameters and cache, and their shards.

    Attributes:
      axes: the mesh's axes besides `stage`, with their sizes.
      specs: for every leaf of (parameters, cache), how it is sharded over them.
      params: the types of the whole parameters.
      shards: (parameters, cache) as one device has them, types alone.
    """

    axes: Mapping[str, int]
    specs: tuple[PartitionSpec, ...]
    params: Any
    shards: tuple[Any, Any]

    @classmethod
    def of(cls, mesh: Mesh | None, whole: tuple[Any, Any], specs: tuple[Any, Any]) -> InnerSharding:
        """The shards of (parameters, cache) by a tree of specs each, or a prefix of one; None for
        no sharding.

        Raises:
          ValueError: a spec names other axes than the mesh has besides `stage`, or does not divide
            its leaf.
        """
        axes = (
            {}
            if mesh is None
            else {name: size for name, size in mesh.shape.items() if name != STAGE}
        )
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
        """The leaves of `params`, if they are what was traced.

        Raises:
          ValueError: another tree, shape or dtype, by name.
        """
        leaves, tree = jax.tree_util.tree_flatten_with_path(params)
        wanted, wanted_tree = jax.tree.flatten(self.params)
        if tree != wanted_tree:
            raise ValueError(
                f"The parameters have another tree.\n  came:   {tree}\n  wanted: {wanted_tree}"
            )
        for (path, leaf), aval in zip(leaves, wanted, strict=True):
            if (jnp.shape(leaf), jnp.result_type(leaf)) != (aval.shape, aval.dtype):
                raise ValueError(
                    f"Parameter {jax.tree_util.keystr(path)} came as "
                    f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}; "
                    f"{aval.dtype}{list(aval.shape)} is wanted."
                )
        return [leaf for _, leaf in leaves]

    def of_slots(self, placement: Placement) -> dict[int, PartitionSpec]:
        """The spec of every slot that is sharded.

        Raises:
          ValueError: weights at the same place of the stages are sharded differently.
        """
        found = {}
        for j, slot in enumerate(placement.slots):
            specs = {self.specs[weight.leaf] for weight in slot.weights if weight is not None}
            if len(specs) > 1:
                raise ValueError(
                    f"{slot.name} is sharded as {specs} on different stages; one way for all is "
                    "wanted."
                )
            if any(specs):
                (found[j],) = specs
        return found


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
        raise ValueError(f"The specs have another tree than what they are for: {error}") from error


def _shard(leaf: Any, spec: PartitionSpec, axes: Mapping[str, int]) -> jax.ShapeDtypeStruct:
    shape = list(jnp.shape(leaf))
    for dimension, entry in enumerate(spec):
        names = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        unknown = [name for name in names if name not in axes]
        if unknown or dimension >= len(shape):
            raise ValueError(
                f"The spec {spec} for {shape} names {unknown or names}; the mesh has {list(axes)} "
                "to shard by."
            )
        ways = math.prod(axes[name] for name in names)
        if shape[dimension] % ways:
            raise ValueError(
                f"Dimension {dimension} of {shape} does not split {ways} ways, as {spec} asks for."
            )
        shape[dimension] //= ways
    return jax.ShapeDtypeStruct(tuple(shape), jnp.result_type(leaf))
