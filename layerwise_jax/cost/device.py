"""A device in plain numbers: sizes of its cache and memory, bandwidths and arithmetic rates."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from layerwise_jax import _json

SPEC_VERSION = 1

# dtype -> wider dtype that a device without units for the first computes in: weights are stored
# narrow and widened to multiply. dtypes that no device has units for get the rate of real numbers
# of their width.
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
    """Sizes and speeds of one kind of device.

    Attributes:
      name: the kind as JAX reports it (`jax.Device.device_kind`).
      l2_bytes: the last-level cache, as the device reports it.
      usable_l2_bytes: the largest working set that is still read at the cache's bandwidth (the
        knee).
      memory_bytes: device memory.
      memory_bandwidth: bytes a second from device memory.
      l2_bandwidth: bytes a second from the cache, for a working set within `usable_l2_bytes`.
      flops_per_second: dtype -> floating-point operations a second of dense matrix products. A key
        covers all dtypes that begin with it: "float8" covers float8_e4m3fn.
      link_bandwidth: bytes a second to one other device, in one direction.
      link_latency: seconds added to every transfer to another device.
      compute_capability: CUDA's number of the architecture ("9.0"); None for other devices than
        NVIDIA GPUs.
      multiprocessors: streaming multiprocessors of a GPU, cores of a CPU.
      clock_hz: cycles a second.
      sources: field -> origin of its figure.
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
                f"{self.name}: usable_l2_bytes must be at most l2_bytes, {self.l2_bytes}, got "
                f"{self.usable_l2_bytes}."
            )
        unsourced = (
            {each.name for each in dataclasses.fields(self)}
            - {"name", "sources"}
            - set(self.sources)
        )
        if unsourced:
            raise ValueError(
                f"{self.name}: sources must have an entry for every field, got none for "
                f"{sorted(unsourced)}. Name the origin of each figure."
            )

    def rate(self, dtype: str) -> float:
        """FLOP/s of dense matrix products in `dtype`, or in the next wider dtype with a rate.

        Raises:
          ValueError: neither the dtype nor a wider one has a rate.
        """
        named = [name for name in {*WIDER, *self.flops_per_second} if dtype.startswith(name)]
        narrowest = max(named, key=len, default=None)
        while narrowest is not None and narrowest not in self.flops_per_second:
            narrowest = WIDER.get(narrowest)
        if narrowest is None:
            known = ", ".join(self.flops_per_second)
            raise ValueError(
                f"dtype must be one that {self.name} has a rate for ({known}) or a narrower one, "
                f"got {dtype}."
            )
        return self.flops_per_second[narrowest]

    def seconds(self, flops: float, num_bytes: float, dtype: str, resident: bool = False) -> float:
        """Roofline time: the larger of arithmetic time and transfer time of `num_bytes`, in s.

        Args:
          flops: floating-point operations.
          num_bytes: bytes read and written.
          dtype: dtype of the operands, such as "float16".
          resident: True if the bytes are in the cache, False if they are in memory.
        """
        bandwidth = self.l2_bandwidth if resident else self.memory_bandwidth
        return max(flops / self.rate(dtype), num_bytes / bandwidth)

    def transfer_seconds(self, num_bytes: float) -> float:
        """Seconds to send `num_bytes` to another device."""
        return self.link_latency + num_bytes / self.link_bandwidth

    def tensor_ways_to_fit(self, weight_bytes: int) -> int:
        """The fewest devices over which a layer's weights split into shares that fit the cache."""
        return max(1, -(-weight_bytes // self.usable_l2_bytes))

    def resident_parameters(self, num_devices: int, bits: int = 16) -> int:
        """Parameters that the caches hold (capacity law): devices x usable cache x 8 / bits."""
        return num_devices * self.usable_l2_bytes * 8 // bits

    def devices_to_hold(self, num_parameters: int, bits: int = 16) -> int:
        """The fewest devices whose caches hold `num_parameters` of `bits` each (capacity law)."""
        return max(1, -(-num_parameters * bits // (8 * self.usable_l2_bytes)))

    def to_json(self) -> str:
        """JSON text that `from_json` reads back."""
        return json.dumps({"version": SPEC_VERSION, **dataclasses.asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> DeviceSpec:
        """Parses the text of `to_json`, or of a calibration's file.

        Raises:
          ValueError: not JSON, another version, or fields missing, unknown or of a wrong type.
        """
        return _json.read(cls, text, SPEC_VERSION, "Calibrate again.")


def _check_field(device: str, name: str, value: Any, annotation: str) -> None:
    """Checks one field against its annotation.

    Raises:
      ValueError: a wrong type, or a number that is not positive and finite.
    """
    if value is None and annotation.endswith("| None"):
        return
    kind = annotation.split(" | ")[0].split("[")[0]
    accepted = {"str": (str,), "int": (int,), "float": (int, float), "Mapping": (Mapping,)}[kind]
    if isinstance(value, bool) or not isinstance(value, accepted):
        raise ValueError(f"{device}: {name} must be of type {annotation}, got {value!r}.")
    if isinstance(value, Mapping):
        inner = annotation.removeprefix("Mapping[str, ").removesuffix("]")
        for key, entry in cast(Mapping[str, Any], value).items():
            _check_field(device, f"{name}[{key!r}]", entry, inner)
    elif isinstance(value, int | float) and not 0 < value < math.inf:
        raise ValueError(f"{device}: {name} must be positive and finite, got {value}.")
