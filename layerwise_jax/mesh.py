"""Mesh of a pipeline: axis names, a default mesh, checks; calls under other meshes of the caller.

`jax.set_mesh(mesh)` holds for whatever runs inside it, and arrays with Explicit axes carry their
mesh in their type. A pipeline's program has its own mesh, so it is traced without the caller's
context, on arrays moved to its mesh; its outputs move to the caller's mesh where JAX would refuse
to mix the two. Without a context and arrays of other meshes all of this is the identity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from layerwise_jax import processes
from layerwise_jax._jax import Tracer, context_mesh, is_tracing, no_context_mesh

STAGE = "stage"
DATA = "data"
REPLICATED = PartitionSpec()


def check_mesh(mesh: Mesh, num_devices: int | None) -> int:
    """Checks the axis `stage` of a mesh and returns the size of its axis `data`, 1 without one.

    Args:
      mesh: the mesh of a pipeline.
      num_devices: required size of the axis `stage`; None for any.

    Raises:
      ValueError: no axis `stage`, or one of another size.
    """
    if STAGE not in mesh.axis_names:
        raise ValueError(
            f"mesh must have an axis 'stage', got the axes {mesh.axis_names}. Make it with "
            "jax.make_mesh((num_stages,), ('stage',), "
            "axis_types=(jax.sharding.AxisType.Auto,))."
        )
    if num_devices is not None and mesh.shape[STAGE] != num_devices:
        raise ValueError(
            f"mesh must have {num_devices} devices on its axis 'stage', one for each stage, got "
            f"{mesh.shape[STAGE]}. Give a mesh of that size, another num_stages, or a schedule "
            "that places several stages on a device, such as 'interleaved_1f1b'."
        )
    return mesh.shape.get(DATA, 1)


def stage_mesh(num_devices: int) -> Mesh:
    """A mesh of the first `num_devices` devices of all processes on one axis, `stage`.

    Devices of a process are neighbours, so that only every last stage of a process sends to
    another process.

    Raises:
      ValueError: there are fewer devices.
    """
    devices = processes.devices()
    if len(devices) < num_devices:
        raise ValueError(
            f"num_devices must be at most {len(devices)}, the number of devices, got "
            f"{num_devices}. Ask for fewer stages, or emulate devices on the CPU: "
            f"layerwise_jax.emulate_devices({num_devices}) before any other use of JAX."
        )
    return Mesh(np.array(devices[:num_devices]), (STAGE,), axis_types=(AxisType.Auto,))


def emulate_devices(count: int) -> None:
    """Makes JAX use `count` emulated CPU devices. Call it before any array or device is made.

    Raises:
      RuntimeError: JAX has started with another number of devices.
    """
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        raise RuntimeError(
            f"emulate_devices({count}) must run before JAX starts its backend, and it has started "
            "with another number of devices. Call it before the first array or device is made."
        ) from error


def automatic(mesh: Mesh) -> Mesh:
    """The same mesh with Auto axes only: inside a stage, XLA's partitioner decides."""
    if all(kind == AxisType.Auto for kind in mesh.axis_types):
        return mesh
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def on_own_mesh(
    mesh: Mesh,
    call: Callable[..., Any],
    arguments: tuple[Any, ...],
    specs: tuple[Any, ...],
) -> Any:
    """`call(*arguments)` without the caller's mesh context, arrays of other meshes moved to `mesh`.

    Args:
      mesh: the pipeline's mesh.
      call: a function of trees of arrays.
      arguments: its trees of arrays.
      specs: the same trees of partition specs.

    Raises:
      ValueError: under a trace, the context mesh has other devices than `mesh`.
    """
    _check_devices(mesh)
    with no_context_mesh():
        return call(
            *jax.tree.map(lambda x, s: _moved_in(x, NamedSharding(mesh, s)), arguments, specs)
        )


def moved_to(mesh: Mesh, tree: Any) -> Any:
    """Arrays of other meshes moved to `mesh`, replicated; others as they are."""
    return jax.tree.map(lambda x: _moved_in(x, NamedSharding(mesh, REPLICATED)), tree)


def in_context(mesh: Mesh, results: Any) -> Any:
    """Results of a call, moved to the caller's context mesh where JAX would refuse to mix the two.

    That is a context mesh with Explicit axes, which types carry, or with other devices.
    """
    context = context_mesh()
    if context is None or not _needs_move(context, mesh):
        return results
    return jax.tree.map(lambda x: _moved_out(x, mesh, context), results)


def _needs_move(context: Mesh, mesh: Mesh) -> bool:
    is_explicit = AxisType.Explicit in context.axis_types and context != mesh
    return is_explicit or set(context.devices.flat) != set(mesh.devices.flat)


def _check_devices(mesh: Mesh) -> None:
    context = context_mesh()
    if context is None or not is_tracing():
        return
    if set(context.devices.flat) != set(mesh.devices.flat):
        axes = ", ".join(f"{name}={size}" for name, size in context.shape.items())
        raise ValueError(
            f"jax.set_mesh under jax.jit must be of the pipeline's {mesh.devices.size} devices, "
            f"got a mesh of {context.devices.size} devices ({axes}): JAX runs a jitted call on "
            "all devices of its context. Call the pipeline without jit around it, or within "
            "`with jax.set_mesh(pipeline.mesh):`, or build it with a mesh over all those devices "
            "that has an axis 'stage'."
        )


def _moved_in(x: Any, target: NamedSharding) -> Any:
    """An array as it is, or moved to a sharding of the pipeline's mesh."""
    if not isinstance(x, jax.Array):
        return x
    typed = jax.typeof(x).sharding
    is_elsewhere = not typed.mesh.empty and typed.mesh != target.mesh.abstract_mesh
    if isinstance(x, Tracer):
        return jax.device_put(x, target, src=typed) if is_elsewhere else x
    is_explicit = is_elsewhere and AxisType.Explicit in typed.mesh.axis_types
    has_other_devices = x.committed and x.sharding.device_set != target.device_set
    return jax.device_put(x, target) if is_explicit or has_other_devices else x


def _moved_out(x: Any, mesh: Mesh, context: Mesh) -> Any:
    if not isinstance(x, jax.Array):
        return x
    target = NamedSharding(context.abstract_mesh if is_tracing() else context, REPLICATED)
    if isinstance(x, Tracer):
        return jax.device_put(x, target, src=NamedSharding(mesh, REPLICATED))
    return jax.device_put(x, target)
