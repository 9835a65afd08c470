"""Choice of a transport by name and by what the devices can do."""

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from layerwise_jax.cost.devices import A100, H100
from layerwise_jax.decode.transport import PeerStore, Permute, choose_transport
from layerwise_jax.xla.aot import absent_mesh, can_compile_for_absent_gpus
from layerwise_jax.xla.cuda_driver import CudaDriver, CudaDriverError
from tests.support.fake_cuda import FakeCuda

needs_plugin = pytest.mark.skipif(
    not can_compile_for_absent_gpus(), reason="no compiler for absent GPUs"
)


@dataclass(frozen=True)
class Gpu:
    """The attributes of a device that the choice reads."""

    local_hardware_id: int
    platform: str = "gpu"
    process_index: int = 0
    compute_capability: str = "9.0"


def gpus(count: int, **changes: Any) -> Any:
    """A mesh of such devices."""
    devices = np.array([replace(Gpu(i), **changes) for i in range(count)])
    return SimpleNamespace(devices=devices, axis_names=("stage",), shape={"stage": count})


@pytest.fixture
def local(monkeypatch):
    """Makes the devices of a mesh local."""

    def make(mesh):
        monkeypatch.setattr(jax, "local_devices", lambda: list(mesh.devices.flat))
        return mesh

    return make


def test_permute_on_devices_that_are_no_gpus(stage_mesh):
    assert choose_transport("auto", stage_mesh(2)) == Permute()
    assert choose_transport("permute", stage_mesh(2)) == Permute()
    with pytest.raises(ValueError, match="where the mesh has devices of the platform cpu"):
        choose_transport("peer_store", stage_mesh(2))


@pytest.mark.parametrize("value", ["nccl", None, 3])
def test_another_value_is_refused(stage_mesh, value):
    with pytest.raises(ValueError, match="transport must be one of"):
        choose_transport(value, stage_mesh(2))


def test_a_wait_without_length_is_refused():
    with pytest.raises(ValueError, match="wait_seconds must be more than 0"):
        PeerStore(wait_seconds=0)


@needs_plugin
def test_absent_gpus_have_peer_stores_where_asked_for():
    mesh = absent_mesh(H100, {"stage": 2})
    assert choose_transport("auto", mesh) == Permute()
    assert choose_transport("peer_store", mesh) == PeerStore()
    with pytest.raises(ValueError, match=r"compute capability 8\.0"):
        choose_transport("peer_store", absent_mesh(A100, {"stage": 2}))
    hosts = absent_mesh(H100, {"stage": 16})
    with pytest.raises(ValueError, match="several processes"):
        choose_transport("peer_store", hosts)
    one = absent_mesh(H100, {"stage": 1})
    assert choose_transport("peer_store", one) == Permute()  # no message leaves the device


def test_local_gpus_are_asked_for_access(local):
    mesh = local(gpus(3))
    assert choose_transport("auto", mesh, lambda: CudaDriver(FakeCuda())) == PeerStore()
    # Sender 2 needs device 0's memory, and not device 0 that of device 2.
    assert choose_transport("auto", mesh, lambda: CudaDriver(FakeCuda([(0, 2)]))) == PeerStore()
    assert choose_transport("auto", mesh, lambda: CudaDriver(FakeCuda([(2, 0)]))) == Permute()
    with pytest.raises(ValueError, match="does not reach the memory of"):
        choose_transport("peer_store", mesh, lambda: CudaDriver(FakeCuda([(2, 0)])))


def test_a_missing_driver_means_permute(local):
    def load():
        raise CudaDriverError("libcuda.so.1 cannot be loaded")

    mesh = local(gpus(2))
    assert choose_transport("auto", mesh, load) == Permute()
    with pytest.raises(ValueError, match=r"libcuda\.so\.1 cannot be loaded"):
        choose_transport("peer_store", mesh, load)


def test_amd_devices_permute(local):
    assert choose_transport("auto", local(gpus(2, compute_capability="gfx942"))) == Permute()


def test_the_axis_of_stages_may_be_any(local):
    mesh = gpus(4)
    mesh.devices = mesh.devices.reshape(2, 2)
    mesh.axis_names, mesh.shape = ("tensor", "stage"), {"tensor": 2, "stage": 2}
    unreachable = FakeCuda([(0, 2), (1, 3)])  # not neighbours of a ring
    assert choose_transport("auto", local(mesh), lambda: CudaDriver(unreachable)) == PeerStore()


def test_a_transport_is_taken_as_it_is(stage_mesh):
    mesh = Mesh(np.array(jax.devices()[:2]), ("stage",), axis_types=(AxisType.Auto,))
    assert choose_transport(Permute(), mesh) == Permute()
