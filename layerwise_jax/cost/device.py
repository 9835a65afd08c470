"""A device in plain numbers: sizes of its cache and memory, bandwidths and arithmetic rates."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from layerwise_jax import _json
from layerwise_jax.cost.memory import (
    FIGURES,
    LEVELS,
    MemoryLevel,
    figure_name,
    figures_of,
    levels_of,
)

SPEC_VERSION = 2

# dtype -> wider dtype that a device without units for the first computes in: weights are stored
# narrow and widened to multiply. dtypes that no device has units for get the rate of real numbers
# of their width.
WIDER_DTYPE = {
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

    `DeviceSpec.of` makes one from flat figures, and `updated` replaces some of them.

    Attributes:
      name: the kind as JAX reports it (`jax.Device.device_kind`).
      levels: memory levels, fastest first; "l2" and "memory" among them.
      flops_per_second: dtype -> floating-point operations a second of dense matrix products. A key
        covers all dtypes that begin with it: "float8" covers float8_e4m3fn.
      link_bandwidth: bytes a second to one other device, in one direction.
      link_latency: seconds added to every transfer to another device.
      compute_capability: CUDA's number of the architecture ("9.0"); None for other devices than
        NVIDIA GPUs.
      multiprocessors: streaming multiprocessors of a GPU, cores of a CPU.
      clock_hz: cycles a second.
      sources: origin of each figure, by its flat name.

    Raises:
      ValueError: a figure of a wrong type or not positive, a level missing or out of order, or a
        figure without a source.
    """

    name: str
    levels: tuple[MemoryLevel, ...]
    flops_per_second: Mapping[str, float] = field(hash=False)
    link_bandwidth: float
    link_latency: float
    compute_capability: str | None
    multiprocessors: int
    clock_hz: float
    sources: Mapping[str, str] = field(hash=False, repr=False)

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            if each.name != "levels":
                _check_field(self.name, each.name, getattr(self, each.name), str(each.type))
        names = [level.name for level in self.levels]
        if names not in (["l2", "memory"], ["shared", "l2", "memory"]):
            raise ValueError(
                f"{self.name}: levels must be 'l2' and 'memory', in this order, with 'shared' "
                f"before them or without it, got {names}."
            )
        unsourced = set(_figure_names(self)) - set(self.sources)
        if unsourced:
            raise ValueError(
                f"{self.name}: sources must have an entry for every figure, got none for "
                f"{sorted(unsourced)}. Name the origin of each figure."
            )

    @classmethod
    def of(cls, name: str, **figures: Any) -> DeviceSpec:
        """A spec from flat figures.

        Args:
          name: name of the device.
          **figures: `<level>_bytes`, `usable_<level>_bytes` and `<level>_bandwidth` of the levels
            "l2" and "memory", and of "shared" if the device has it, and all other fields.

        Raises:
          TypeError: a field is missing or unknown.
          ValueError: as the constructor.
        """
        own = {each.name for each in dataclasses.fields(cls)}
        levels = levels_of({key: value for key, value in figures.items() if key not in own})
        known = own | {figure_name(level, figure) for level in LEVELS for figure in FIGURES}
        unknown = sorted(set(figures) - known)
        if unknown:
            raise TypeError(f"figures must be those of a DeviceSpec, got {', '.join(unknown)}.")
        rest = {key: value for key, value in figures.items() if key in own}
        return cls(name=name, levels=levels, **rest)

    def updated(self, **figures: Any) -> DeviceSpec:
        """A copy with some figures replaced, by flat name (`usable_l2_bytes=...`) or field name."""
        mine = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        mine |= figures_of(mine.pop("levels"))
        return DeviceSpec.of(**mine | figures)

    def level(self, name: str) -> MemoryLevel:
        """The memory level of a name.

        Raises:
          ValueError: the device has no such level.
        """
        for level in self.levels:
            if level.name == name:
                return level
        known = ", ".join(repr(level.name) for level in self.levels)
        raise ValueError(f"A memory level of {self.name} must be one of {known}, got {name!r}.")

    @property
    def l2_bytes(self) -> int:
        return self.level("l2").bytes

    @property
    def usable_l2_bytes(self) -> int:
        return self.level("l2").usable_bytes

    @property
    def l2_bandwidth(self) -> float:
        return self.level("l2").bandwidth

    @property
    def memory_bytes(self) -> int:
        return self.level("memory").bytes

    @property
    def memory_bandwidth(self) -> float:
        return self.level("memory").bandwidth

    def rate(self, dtype: str) -> float:
        """FLOP/s of dense matrix products in `dtype`, or in the next wider dtype with a rate.

        Raises:
          ValueError: neither the dtype nor a wider one has a rate.
        """
        named = [name for name in {*WIDER_DTYPE, *self.flops_per_second} if dtype.startswith(name)]
        narrowest = max(named, key=len, default=None)
        while narrowest is not None and narrowest not in self.flops_per_second:
            narrowest = WIDER_DTYPE.get(narrowest)
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
        return _json.read(cls, text, SPEC_VERSION, "Calibrate again.", _upgraded)


def _upgraded(entries: dict[str, Any], version: int) -> dict[str, Any]:
    """Entries of version 1, which had the figures of L2 and memory as fields, with levels."""
    flat = ("l2_bytes", "usable_l2_bytes", "l2_bandwidth", "memory_bytes", "memory_bandwidth")
    missing = sorted(set(flat) - set(entries))
    if missing:
        raise ValueError(
            f"A DeviceSpec's JSON of version 1 must have all fields, got no {missing}."
        )
    levels = levels_of({name: entries[name] for name in flat})
    rest = {name: value for name, value in entries.items() if name not in flat}
    return {**rest, "levels": [dataclasses.asdict(level) for level in levels]}


def _figure_names(spec: DeviceSpec) -> list[str]:
    """Flat names of all figures that need a source."""
    own = [each.name for each in dataclasses.fields(spec)]
    fields = [name for name in own if name not in ("name", "levels", "sources")]
    sized = [
        figure_name(level.name, figure)
        for level in spec.levels
        for figure in FIGURES
        if not (figure == "usable_bytes" and level.name == "memory")
    ]
    return [*fields, *sized]


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
