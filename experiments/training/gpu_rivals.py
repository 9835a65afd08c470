"""Rivals on the same devices: one device, replicas, tensor parallelism, fully sharded data
parallelism.

Replicas and tensor parallelism are `jit` with shardings, partitioned by XLA, with the constraints
that users write; attention stands under `shard_map`, since its kernel is opaque to the partitioner.
Layers are unrolled, as they are layer-wise: a `scan` over them would compile faster, but slices
every weight out of a stack.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments.training.gpu_model import Model, Sharding
from experiments.training.gpu_strategies import Strategy

AXIS = "device"
WHOLE = PartitionSpec()
FIRST = PartitionSpec(AXIS)
SECOND = PartitionSpec(None, AXIS)
HEADS = PartitionSpec(None, None, AXIS)

# As Megatron splits a block (arXiv:1909.08053): heads, the wide side of the feed-forward, and the
# vocabulary.
TENSOR_SPECS = {
    "query": SECOND,
    "key": SECOND,
    "value": SECOND,
    "out": FIRST,
    "up": SECOND,
    "down": FIRST,
}


def one_device(model: Model, device: Any, microbatches: int, options: dict[str, Any]) -> Strategy:
    """One device; gradients accumulated over microbatches."""
    mesh = _mesh([device])
    whole = NamedSharding(mesh, WHOLE)
    loss = _accumulated(lambda params, tokens: model.loss(params, tokens), microbatches)
    parts = (
        "the whole batch at once"
        if microbatches == 1
        else f"gradients added up over {microbatches} microbatches"
    )
    return _strategy(
        "one device", parts, model, mesh, loss, _everywhere(model, whole), WHOLE, options
    )


def replicas(model: Model, devices: Sequence[Any], options: dict[str, Any]) -> Strategy:
    """Data parallelism: parameters replicated, batch split, gradients summed."""
    mesh = _mesh(devices)
    split = NamedSharding(mesh, FIRST)
    told = Sharding(
        hidden=lambda x: lax.with_sharding_constraint(x, split),
        attention=_attention_over(mesh, FIRST),
    )
    shardings = _everywhere(model, NamedSharding(mesh, WHOLE))
    how = "weights and moments on every device, batch split"
    return _strategy("replicas", how, model, mesh, _plain(model, told), shardings, FIRST, options)


def tensor_parallel(model: Model, devices: Sequence[Any], options: dict[str, Any]) -> Strategy:
    """Heads, MLP and vocabulary split over the devices; the batch is replicated."""
    mesh = _mesh(devices)
    whole = NamedSharding(mesh, WHOLE)
    told = Sharding(
        hidden=lambda x: lax.with_sharding_constraint(x, whole),
        attention=_attention_over(mesh, HEADS),
    )

    def sharding(path: Any, _: Any) -> NamedSharding:
        module, leaf = (key.key for key in path)
        return NamedSharding(mesh, FIRST if module == "embed" else TENSOR_SPECS.get(leaf, WHOLE))

    shardings = jax.tree_util.tree_map_with_path(sharding, model.shapes())
    how = "heads, feed-forward and vocabulary split, batch on every device"
    return _strategy(
        "tensor parallel", how, model, mesh, _plain(model, told), shardings, WHOLE, options
    )


def fully_sharded(model: Model, devices: Sequence[Any], options: dict[str, Any]) -> Strategy:
    """Parameters, gradients and moments split by their first axis, the batch too.

    Written out under `shard_map`: left to itself, XLA gathers the float32 weights, twice the bytes.
    A weight is gathered as bfloat16 where it is used and kept from forward to backward, which is
    the faster choice while there is room; its gradient is summed and scattered as bfloat16.
    """
    mesh = _mesh(devices)
    told = Sharding(weight=lambda x: lax.all_gather(x, AXIS, tiled=True))

    def on_device(params: Any, tokens: jax.Array) -> tuple[jax.Array, Any]:
        loss, grads = jax.value_and_grad(lambda params: model.loss(params, tokens, told))(params)
        return lax.pmean(loss, AXIS), jax.tree.map(lambda grad: grad / mesh.size, grads)

    step = jax.shard_map(
        on_device, mesh=mesh, in_specs=(FIRST, FIRST), out_specs=(WHOLE, FIRST), check_vma=False
    )
    how = "weights, gradients, moments and batch split; weights gathered in bfloat16, once a step"
    return _strategy(
        "FSDP",
        how,
        model,
        mesh,
        step,
        _everywhere(model, NamedSharding(mesh, FIRST)),
        FIRST,
        options,
    )


def _mesh(devices: Sequence[Any]) -> Mesh:
    return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def _everywhere(model: Model, sharding: NamedSharding) -> Any:
    """One sharding for every parameter."""
    return jax.tree.map(lambda _: sharding, model.shapes())


def _attention_over(mesh: Mesh, spec: PartitionSpec) -> Callable[..., Callable[..., jax.Array]]:
    """Attention on each device's share of examples or heads."""
    return lambda attend: jax.shard_map(
        attend, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False
    )


def _plain(model: Model, told: Sharding) -> Callable[..., tuple[jax.Array, Any]]:
    return jax.value_and_grad(lambda params, tokens: model.loss(params, tokens, told))


def _accumulated(
    loss: Callable[..., jax.Array], microbatches: int
) -> Callable[..., tuple[jax.Array, Any]]:
    """(loss, gradients) as means over microbatches, one after the other."""
    if microbatches == 1:
        return jax.value_and_grad(loss)

    def value_and_grad(params: Any, tokens: jax.Array) -> tuple[jax.Array, Any]:
        def add(total: Any, part: jax.Array) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(params, part)), None

        zeros = jnp.float32(0), jax.tree.map(jnp.zeros_like, params)
        total, _ = lax.scan(add, zeros, tokens.reshape(microbatches, -1, tokens.shape[-1]))
        return jax.tree.map(lambda x: x / microbatches, total)

    return value_and_grad


def _copied(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def _strategy(
    name: str,
    how: str,
    model: Model,
    mesh: Mesh,
    value_and_grad: Callable[..., tuple[jax.Array, Any]],
    shardings: Any,
    batch: PartitionSpec,
    options: dict[str, Any],
) -> Strategy:
    return Strategy(
        name=name,
        how=how,
        devices=mesh.size,
        shapes=model.shapes(),
        # A copy, since the step overwrites what it is given and device_put may hand on the same
        # memory.
        place=lambda params: jax.jit(_copied, out_shardings=shardings)(
            jax.device_put(params, shardings)
        ),
        value_and_grad=value_and_grad,
        shardings=shardings,
        whole=NamedSharding(mesh, WHOLE),
        tokens=NamedSharding(mesh, batch),
        options=options,
    )
