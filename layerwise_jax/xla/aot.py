"""Ahead-of-time compilation for a device, present or absent, with sizes from the buffer assignment.

XLA:GPU compiles on machines without a GPU or CUDA libraries: JAX's CUDA plugin (the extra `aot`)
has the compiler, and a target description (`gpu_target.py`) replaces the device. Sizes are those of
the real compiler. Kernels are chosen without timing them, and the workspace of libraries whose
algorithms are chosen by timing is missing.
"""

from __future__ import annotations

import importlib.util
import math
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise_jax import processes
from layerwise_jax.trace.flops import count_work
from layerwise_jax.xla.buffers import (
    BufferAssignment,
    decode_buffer_assignment,
    decode_hlo,
    has_assignment,
)
from layerwise_jax.xla.gpu_target import architecture_of, target_config

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh

    from layerwise_jax.cost.device import DeviceSpec

Options = Mapping[str, bool | int | str]
PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
DEVICES_PER_HOST = 8


class CompilerMissingError(ImportError):
    """XLA's compiler for GPUs is not installed."""


@dataclass(frozen=True)
class CompiledProgram:
    """Memory and work of a compiled program on one device. Sizes are bytes.

    Attributes:
      compiled_by: compiler, and the device compiled for.
      weight_bytes: arguments that are weights.
      argument_bytes: all arguments, weights included.
      output_bytes: outputs that do not overwrite an argument.
      alias_bytes: arguments that outputs overwrite (donated).
      constant_bytes: constants of the program.
      temp_bytes: workspace.
      peak_bytes: peak memory, arguments and outputs included.
      flops: floating-point operations: a scan body times its length, a while_loop body once.
      bytes_accessed: bytes that unfused operations read and write; loops count the same way.
      uncounted: operations that `flops` leaves out.
      library_calls: calls into libraries (cuDNN, cuSOLVER); their workspace is missing from the
        sizes for an absent device.
      compile_seconds: compile time.
      assignment: all allocations with their buffers; None if XLA gave none, and sizes are from
        `memory_analysis`.
      options: XLA options of the program.
    """

    compiled_by: str
    weight_bytes: int
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    constant_bytes: int
    temp_bytes: int
    peak_bytes: int
    flops: float
    bytes_accessed: float
    uncounted: tuple[str, ...]
    library_calls: tuple[str, ...]
    compile_seconds: float
    assignment: BufferAssignment | None
    options: Mapping[str, Any] = field(default_factory=dict)


def can_compile_for_absent_gpus() -> bool:
    """True if the CUDA plugin that `compile_for` needs is installed."""
    return any(_is_importable(plugin) for plugin in PLUGINS)


def absent_devices(device: DeviceSpec, count: int = 1) -> list[Any]:
    """`count` absent devices to compile for, eight per host.

    Raises:
      CompilerMissingError: the CUDA plugin is not installed.
      ValueError: the device is not a GPU of a known architecture.
    """
    from jax.experimental import topologies

    config = target_config(device)
    if not can_compile_for_absent_gpus():
        raise CompilerMissingError(
            f"Compiling for {device.name} without the device needs XLA's CUDA plugin, which is "
            "not installed. "
            "Install it with: pip install 'layerwise-jax[aot]' (Linux only, no CUDA libraries "
            "needed)."
        )
    per_host = min(count, DEVICES_PER_HOST)
    topology = f"1x{math.ceil(count / per_host)}x{per_host}"
    found = topologies.get_topology_desc(platform="cuda", target_config=config, topology=topology)
    return found.devices[:count]


def absent_mesh(device: DeviceSpec, axes: Mapping[str, int]) -> Mesh:
    """Mesh of absent devices, for `shard_map` programs: `absent_mesh(H100, {"stage": 16})`.

    Raises:
      As `absent_devices`.
    """
    import numpy as np
    from jax.sharding import AxisType, Mesh

    devices = np.array(absent_devices(device, math.prod(axes.values()))).reshape(*axes.values())
    return Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def compile_for(
    device: DeviceSpec | None,
    fn: Callable[..., Any],
    args: Sequence[Any],
    *,
    weights: Sequence[int] = (),
    donate: Sequence[int] = (),
    options: Options | None = None,
) -> CompiledProgram:
    """Compile `fn(*args)` for a device and read its sizes. Nothing runs and no array is made.

    Args:
      device: GPU, present or absent; None for the first local device.
      fn: JAX function.
      args: trees of `jax.ShapeDtypeStruct` or arrays. Shardings are kept; for several absent
        devices they are over an `absent_mesh`, and sizes are those of one device.
      weights: positions in `args` of the arguments that are weights.
      donate: positions of the arguments that the program may overwrite.
      options: XLA compiler options of this program.

    Raises:
      CompilerMissingError: the CUDA plugin is not installed.
      ValueError: the device is not a GPU of a known architecture, or a position is not one of
        `args`.
    """
    import jax

    outside = [position for position in (*weights, *donate) if position not in range(len(args))]
    if outside:
        raise ValueError(
            f"weights and donate must be positions of the {len(args)} arguments, got {outside}."
        )
    target = processes.local_device() if device is None else absent_devices(device)[0]
    args = _placed(args, jax.sharding.SingleDeviceSharding(target))
    # keep_unused: the program's parameters are then the leaves of `args`, one for one.
    with _kernels_for(device, args):
        traced = jax.jit(fn, keep_unused=True, donate_argnums=tuple(donate)).trace(*args)
        lowered = traced.lower()
    started = processes.stopwatch()
    compiled, assignment = _compile(lowered, options or {})
    seconds = processes.stopwatch() - started
    work = count_work(traced.jaxpr)
    return CompiledProgram(
        compiled_by=f"XLA:{target.platform.upper()} for {target.device_kind}"
        + (", absent" if device else ""),
        weight_bytes=sum(
            _shard_bytes(leaf) for i in sorted(set(weights)) for leaf in jax.tree.leaves(args[i])
        ),
        **_sizes(compiled.memory_analysis(), assignment),
        flops=work.flops,
        bytes_accessed=work.bytes_accessed,
        uncounted=work.uncounted,
        library_calls=_library_calls(compiled.as_text() or ""),
        compile_seconds=seconds,
        assignment=assignment,
        options=dict(options or {}),
    )


def _kernels_for(device: DeviceSpec | None, args: tuple[Any, ...]) -> AbstractContextManager[Any]:
    """Context in which Pallas lowers kernels for an absent device instead of the local one.

    Programs over a mesh take the device kind from the mesh.
    """
    import jax
    from jax.sharding import (
        AbstractDevice,
        AbstractMesh,
        AxisType,
        NamedSharding,
        use_abstract_mesh,
    )

    if device is None or any(
        isinstance(leaf.sharding, NamedSharding) for leaf in jax.tree.leaves(args)
    ):
        return nullcontext()
    kind = AbstractDevice(architecture_of(device).pallas_kind, None, "gpu")
    return use_abstract_mesh(
        AbstractMesh((1,), ("device",), (AxisType.Auto,), abstract_device=kind)
    )


def _is_importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _placed(args: Sequence[Any], sharding: jax.sharding.Sharding) -> tuple[Any, ...]:
    """Types of the arguments; those without a sharding are on the one device."""
    import jax

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        own = leaf.sharding if isinstance(leaf, jax.ShapeDtypeStruct) else None
        return jax.ShapeDtypeStruct(
            leaf.shape,
            leaf.dtype,
            sharding=own or sharding,
            weak_type=getattr(leaf, "weak_type", False),
        )

    return jax.tree.map(place, tuple(args))


def _compile(
    lowered: jax.stages.Lowered, options: Options
) -> tuple[jax.stages.Compiled, BufferAssignment | None]:
    """Compiled program and its buffer assignment.

    XLA dumps the assignment with the optimized module and its instruction names. The one of
    `memory_analysis` has no names and is empty for GPUs.
    """
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile(
            {**options, "xla_dump_to": folder, "xla_dump_hlo_as_proto": True}
        )
        dumped = _dumped_assignment(Path(folder))
    serialized = getattr(compiled.memory_analysis(), "serialized_buffer_assignment_proto", b"")
    if dumped is None and serialized:
        return compiled, decode_buffer_assignment(serialized)
    return compiled, dumped


def _dumped_assignment(folder: Path) -> BufferAssignment | None:
    """Assignment among XLA's dumps; None for programs from JAX's persistent compilation cache."""
    # Modules that the compiler only tries out, to choose kernels, are dumped too, under names that
    # do not begin so.
    dumps = [path.read_bytes() for path in folder.glob("*.jit_*after_optimizations.hlo.pb")]
    if not dumps or not has_assignment(dumps[0]):
        return None
    return decode_hlo(dumps[0])


def _sizes(memory: Any, assignment: BufferAssignment | None) -> dict[str, int]:
    """Sizes by name, from the assignment if there is one: XLA's CPU peak lacks temporaries."""
    if assignment is None:
        held = (
            memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        )
        return {
            "argument_bytes": memory.argument_size_in_bytes,
            "output_bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes,
            "alias_bytes": memory.alias_size_in_bytes,
            "constant_bytes": 0,
            "temp_bytes": memory.temp_size_in_bytes,
            "peak_bytes": held + memory.temp_size_in_bytes,
        }
    return {
        "argument_bytes": assignment.bytes_of("argument"),
        "output_bytes": assignment.bytes_of("output"),
        "alias_bytes": assignment.alias_bytes,
        "constant_bytes": assignment.bytes_of("constant"),
        "temp_bytes": assignment.bytes_of("temporary"),
        "peak_bytes": assignment.peak_bytes,
    }


def _library_calls(hlo: str) -> tuple[str, ...]:
    """Targets of custom calls into libraries, each once, without XLA's kernels and annotations."""
    targets = dict.fromkeys(re.findall(r'custom_call_target="([^"]+)"', hlo))
    return tuple(
        target
        for target in targets
        if not target.startswith(("__gpu$xla.gpu.triton", "Sharding", "SPMD"))
    )


def _shard_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    """Bytes of one device's shard of an argument. int4 is packed; keys count their data."""
    from jax import dtypes

    assert leaf.sharding is not None
    elements = math.prod(leaf.sharding.shard_shape(leaf.shape))
    is_extended = dtypes.issubdtype(leaf.dtype, dtypes.extended)  # pyright: ignore[reportPrivateImportUsage]
    bits = 8 * leaf.dtype.itemsize if is_extended else dtypes.itemsize_bits(leaf.dtype)
    return -(-elements * bits // 8)
