"""Processes of one program: indices, addressable devices, clocks and the existence of files.

No other module asks for these.

One rule keeps many processes one program: every collective and every barrier is reached by all
processes, in one order. So a branch never depends on what only one process sees. Whatever is
measured or looked up (seconds, a file's existence) is decided by process 0 and broadcast.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from layerwise_jax._jax import Tracer, is_key, wrap_key


def is_main() -> bool:
    """True on the process that decides, prints and writes shared files."""
    return jax.process_index() == 0


def is_distributed() -> bool:
    """True if the program runs on several processes."""
    return jax.process_count() > 1


def devices() -> list[Any]:
    """All devices of all processes; those of one process are neighbours."""
    return jax.devices()


def local_device() -> Any:
    """The device that this process compiles for and measures on."""
    return jax.local_devices()[0]


def are_of_several(devices: Sequence[Any]) -> bool:
    """True if the devices belong to more than one process."""
    return len({device.process_index for device in devices}) > 1


def owners(mesh: Mesh) -> np.ndarray | None:
    """int[replicas, stage devices], the process of every device; None if all have one process.

    Axes other than `stage` count as replicas.
    """
    if not are_of_several(list(mesh.devices.flat)):
        return None
    indices = np.vectorize(lambda device: device.process_index)(mesh.devices)
    stage = mesh.axis_names.index("stage")
    return np.moveaxis(indices, stage, -1).reshape(-1, mesh.devices.shape[stage])


def are_local(devices: Sequence[Any]) -> bool:
    """True if all of the devices are there and belong to this process."""
    return set(devices) <= set(jax.local_devices())


def decide(choose: Callable[[], Any]) -> Any:
    """A JSON value that process 0 chooses, the same on every process.

    Args:
      choose: called on process 0 only; it must not run a collective. An exception that it raises
        is raised on every process.
    """
    if not is_distributed():
        return choose()
    found: dict[str, Any] = {}
    failure: Exception | None = None
    if is_main():
        try:
            found = {"value": choose()}
        except Exception as error:  # every process has to learn of it, whatever it is
            failure = error
            found = {"error": f"{type(error).__name__}: {error}"}
    received = json.loads(_broadcast_text(json.dumps(found)))
    if failure is not None:
        raise failure
    if "error" in received:
        raise RuntimeError(f"Process 0 failed: {received['error']}")
    return received["value"]


def _broadcast_text(text: str) -> str:
    encoded = np.frombuffer(text.encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(encoded.size)))
    padded = np.zeros(length, np.uint8)
    if is_main():
        padded[:] = encoded
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))).decode()


def all_gather(value: Any) -> list[Any]:
    """A JSON value of every process, in the order of their indices, on every process."""
    if not is_distributed():
        return [value]
    encoded = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.int32(encoded.size)))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: encoded.size] = encoded
    rows = np.asarray(multihost_utils.process_allgather(padded))  # [processes, longest]
    return [
        json.loads(bytes(row[:length])) for row, length in zip(rows, lengths.ravel(), strict=True)
    ]


def barrier(name: str) -> None:
    """Wait until every process is here."""
    if is_distributed():
        multihost_utils.sync_global_devices(name)


def exists(path: Path) -> bool:
    """True if process 0 sees the path. All processes get its answer, so they decide alike."""
    return bool(decide(path.exists))


def is_directory(path: Path) -> bool:
    """True if process 0 sees a directory there."""
    return bool(decide(path.is_dir))


def seconds_of(run: Callable[[], Any]) -> float:
    """Wall-clock seconds of `run`, which every process calls; process 0's clock decides."""
    started = time.perf_counter()
    run()
    elapsed = time.perf_counter() - started
    return float(decide(lambda: elapsed))


def stopwatch() -> float:
    """This process's clock, in seconds; for what is printed, never for a decision."""
    return time.perf_counter()


def read_shard(array: Any, index: int) -> Any:
    """Entry `index` of an array's first axis, on the host of every process; keys stay keys.

    Every process calls this, in one order, for an array that some process holds only in part.
    """
    if is_key(array):
        return wrap_key(read_shard(jax.random.key_data(array), index), array)
    if is_partial(array):
        everywhere = NamedSharding(mesh_of(array), PartitionSpec())
        array = jax.jit(lambda x: x[index], out_shardings=everywhere)(array)
        return np.asarray(array.addressable_data(0))
    for shard in getattr(array, "addressable_shards", ()):
        rows = range(*shard.index[0].indices(array.shape[0]))
        if index in rows and shard.data.shape[1:] == array.shape[1:]:
            return np.asarray(shard.data)[index - rows.start]
    return np.asarray(array[index])


def local_shards(sharding: Any, shape: Sequence[int]) -> list[tuple[Any, Any]]:
    """(device, index of its shard) of every device of this process."""
    found = sharding.addressable_devices_indices_map(tuple(shape)).items()
    return [(device, index) for device, index in found if index is not None]


def is_partial(tree: Any) -> bool:
    """True if this process holds only a part of some array of the tree."""
    return any(
        isinstance(leaf, jax.Array)
        and not isinstance(leaf, Tracer)
        and not leaf.is_fully_addressable
        for leaf in jax.tree.leaves(tree)
    )


def mesh_of(array: jax.Array) -> Mesh:
    """The mesh of an array that lives on one."""
    sharding = array.sharding
    assert isinstance(sharding, NamedSharding)
    assert isinstance(sharding.mesh, Mesh)
    return sharding.mesh


def blocks_of(array: jax.Array) -> list[tuple[int, np.ndarray]]:
    """(first row, rows) of this process's part of an array spread over its first axis.

    Over all processes together every row is there once.
    """
    shards = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    assert all(shard.data.shape[1:] == array.shape[1:] for shard in shards), "blocks are whole rows"
    return [
        ((shard.index[0].start or 0) if shard.index else 0, np.asarray(shard.data))
        for shard in shards
    ]


def copies_on(array: jax.Array, mesh: Mesh) -> jax.Array:
    """A replicated array on some of its devices, those of `mesh`. Nothing is copied."""
    devices = set(mesh.devices.flat)
    shards = [shard.data for shard in array.addressable_shards if shard.device in devices]
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.make_array_from_single_device_arrays(array.shape, sharding, shards)


def joined_copies(arrays: Sequence[jax.Array], mesh: Mesh) -> jax.Array:
    """The inverse of `copies_on`: equal arrays on sub-meshes as one, replicated over `mesh`."""
    shards = [shard.data for array in arrays for shard in array.addressable_shards]
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.make_array_from_single_device_arrays(arrays[0].shape, sharding, shards)


def spread(mesh: Mesh, aval: Any) -> NamedSharding:
    """The sharding of an array over all devices: its first axis if they divide it, else replicated.

    Shards are then contiguous blocks of the array's bytes, and no device holds all of a large one.
    """
    is_divided = bool(aval.shape) and aval.shape[0] % mesh.size == 0 and aval.shape[0] > 0
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names) if is_divided else PartitionSpec())


def compute(function: Callable[..., Any], mesh: Mesh, *args: Any, shardings: Any = None) -> Any:
    """`function(*args)` as one program over the devices of all processes.

    Args:
      function: a function of arrays.
      mesh: the mesh of the results.
      *args: global arrays, or host arrays that are equal on all processes.
      shardings: of the results, a tree or a prefix of it; None spreads each over all devices.
    """
    if shardings is None:
        avals = jax.eval_shape(function, *args)
        shardings = jax.tree.map(lambda aval: spread(mesh, aval), avals)
    return jax.jit(function, out_shardings=shardings)(*args)
