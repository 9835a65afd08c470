"""A device in plain numbers: how much its cache and memory hold, and how fast it reads, computes
and sends.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from layerwise_jax import _json

SPEC_VERSION = 1

# A device without units for a dtype computes in the next wider one: weights are stored narrow and
# widened to multiply. What no device has units for is taken at the rate of real numbers as wide.
WIDER = {
    "float4": "float8",
    "float8": "float16",
    "int4": "int8",
    "int8": "float16",
    "float16": "float32",
    "bfloat16": "float32",
    "tensorfloat32": "float32",
    "complex64": "float32",
    "complex128": "float64",
    "uint4": "int4",
    "uint8": "int8",
    **dict.fromkeys(("bool", "int16", "int32", "int64", "uint16", "uint32", "uint64"), "float32"),
}


@dataclass(frozen=True)
class DeviceSpec:
    """A device to fit stages to.

    Attributes:
      name: the device as JAX names its kind (`jax.Device.device_kind`).
      l2_bytes: the last-level cache, as the device reports it.
      usable_l2_bytes: the largest working set that is still read at the cache's bandwidth (the
        knee).
      memory_bytes: device memory.
      memory_bandwidth: bytes a second from device memory.
      l2_bandwidth: bytes a second from the cache, for a working set within `usable_l2_bytes`.
      flops_per_second: floating-point operations a second of dense matrix products, by dtype. A
        name stands for all dtypes that begin with it: "float8" for float8_e4m3fn.
      link_bandwidth: bytes a second to one other device, in one direction.
      link_latency: seconds that a transfer to another device takes on top of its bytes.
      compute_capability: CUDA's number of the architecture ("9.0"); None for a device that is no
        NVIDIA GPU.
      multiprocessors: streaming multiprocessors of a GPU, cores of a CPU.
      clock_hz: cycles a second.
      sources: where each figure comes from, by the name of its field.
    """

    name: str
    l2_bytes: int
    usable_l2_bytes: int
    memory_bytes: int
    memory_bandwidth: float
    l2_bandwidth: float
    flops_per_second: Mapping[str, float] = field(hash=False)
    link_bandwidth: float
    link_latency: float
    compute_capability: str | None
    multiprocessors: int
    clock_hz: float
    sources: Mapping[str, str] = field(hash=False, repr=False)

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            _check_field(self.name, each.name, getattr(self, each.name), str(each.type))
        if self.usable_l2_bytes > self.l2_bytes:
            raise ValueError(
                f"{self.name}: usable_l2_bytes is {self.usable_l2_bytes}, more than the whole "
                f"cache's {self.l2_bytes}."
            )
        unsourced = (
            {each.name for each in dataclasses.fields(self)}
            - {"name", "sources"}
            - set(self.sources)
        )
        if unsourced:
            raise ValueError(
                f"{self.name}: sources says nothing of {sorted(unsourced)}; say where each figure "
                "is from."
            )

    def rate(self, dtype: str) -> float:
        """FLOP/s of dense matrix products in `dtype`; without units for it, of the next wider dtype
        that has them.

        Raises:
          ValueError: the device has a rate neither for the dtype nor for a wider one.
        """
        named = [name for name in {*WIDER, *self.flops_per_second} if dtype.startswith(name)]
        narrowest = max(named, key=len, default=None)
        while narrowest is not None and narrowest not in self.flops_per_second:
            narrowest = WIDER.get(narrowest)
        if narrowest is None:
            known = ", ".join(self.flops_per_second)
            raise ValueError(
                f"{self.name} has no rate for dtype {dtype}; flops_per_second has {known}."
            )
        return self.flops_per_second[narrowest]

    def seconds(self, flops: float, num_bytes: float, dtype: str, resident: bool = False) -> float:
        """The roofline: the longer of computing `flops` in `dtype` and of reading or writing
        `num_bytes` once.

        Args:
          flops: floating-point operations.
          num_bytes: bytes read and written.
          dtype: of the operands, "float16" say.
          resident: whether the bytes are in the cache rather than in memory.
        """
        bandwidth = self.l2_bandwidth if resident else self.memory_bandwidth
        return max(flops / self.rate(dtype), num_bytes / bandwidth)

    def transfer_seconds(self, num_bytes: float) -> float:
        """Seconds to send `num_bytes` to another device."""
        return self.link_latency + num_bytes / self.link_bandwidth

    def tensor_ways_to_fit(self, weight_bytes: int) -> int:
        """Devices that a layer's weights must be split over, for each share to fit the usable
        cache.
        """
        return max(1, -(-weight_bytes // self.usable_l2_bytes))

    def resident_parameters(self, num_devices: int, bits: int = 16) -> int:
        """The capacity law: parameters that the caches of `num_devices` hold, devices x usable
        cache x 8 / bits.
        """
        return num_devices * self.usable_l2_bytes * 8 // bits

    def devices_to_hold(self, num_parameters: int, bits: int = 16) -> int:
        """The capacity law turned round: the fewest devices whose caches hold `num_parameters` of
        `bits` each.
        """
        return max(1, -(-num_parameters * bits // (8 * self.usable_l2_bytes)))

    def to_json(self) -> str:
        """The spec as JSON text; `from_json` reads it back."""
        return json.dumps({"version": SPEC_VERSION, **dataclasses.asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> DeviceSpec:
        """A spec from `to_json`, or from a file that calibration wrote.

        Raises:
          ValueError: not JSON, of another version, or with fields missing, unknown or of the wrong
            type.
        """
        return _json.read(cls, text, SPEC_VERSION, "Calibrate again.")


def _check_field(device: str, name: str, value: Any, annotation: str) -> None:
    """Check one field against its annotation.

    Raises:
      ValueError: a wrong type, or a number that is not positive and finite.
    """
    if value is None and annotation.endswith("| None"):
        return
    kind = annotation.split(" | ")[0].split("[")[0]
    accepted = {"str": (str,), "int": (int,), "float": (int, float), "Mapping": (Mapping,)}[kind]
    if isinstance(value, bool) or not isinstance(value, accepted):
        raise ValueError(f"{device}: {name} is {value!r}; wanted {annotation}.")
    if isinstance(value, Mapping):
        inner = annotation.removeprefix("Mapping[str, ").removesuffix("]")
        for key, entry in value.items():
            _check_field(device, f"{name}[{key!r}]", entry, inner)
    elif isinstance(value, int | float) and not 0 < value < math.inf:
        raise ValueError(f"{device}: {name} is {value}; a positive, finite number is wanted.")
