"""Efficiency factors: achieved over nominal performance of a device, and constant overheads."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field

from layerwise_jax import _json

SHARES = ("weight_share", "state_share", "cache_share", "arithmetic_share")


@dataclass(frozen=True)
class Calibration:
    """Efficiency factors (`*_share`) and overheads (`*_seconds`) of compiled programs.

    Attributes:
      weight_share: share of the memory's bandwidth in products with few rows.
      state_share: share of the memory's bandwidth in attention that reads its cache.
      cache_share: share of the cache's bandwidth in products with resident weights.
      arithmetic_share: share of the device's arithmetic rate in products with many rows.
      kernels_per_layer: kernels of a compiled layer.
      kernel_seconds: overhead of a kernel: its launch, its first and its last wave.
      row_seconds: overhead of an example in a layer: softmax, cache update.
      tick_seconds: overhead of an iteration of the compiled loop, with embedding, head and
        sampling.
      all_reduce_seconds: time of an all-reduce of a few bytes.
      source: origin of the figures.
      permute_seconds: time of an exchange of a few bytes between stages, added to a tick; None for
        the device's `link_latency`.
    """

    weight_share: float
    state_share: float
    cache_share: float
    arithmetic_share: float
    kernels_per_layer: float
    kernel_seconds: float
    row_seconds: float
    tick_seconds: float
    all_reduce_seconds: float
    source: str = field(compare=False)
    permute_seconds: float | None = None

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if each.name in SHARES and not 0 < value <= 1:
                raise ValueError(f"{each.name} must be above 0 and at most 1, got {value}.")
            if each.name != "source" and value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{each.name} must be finite and at least 0, got {value}.")

    def to_json(self) -> str:
        """JSON text that `from_json` reads back."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Parses the text of `to_json`.

        Raises:
          ValueError: not JSON, or fields missing, unknown or of a wrong type.
        """
        return _json.read(cls, text)


# Stock XLA on an H200, hand-written programs. cache_share, arithmetic_share and kernels_per_layer
# were held; the rest is fitted (`fit_calibration`) to thirteen measurements: four layers of d =
# 1024 and of d = 4096 on one device, two tensor ways and two stages, and one layer of d = 4096 at
# four microbatches. It predicts them to within 11 %. cache_share: products of 8 MiB take 1.0 to
# 1.7 us less with resident weights than with streamed ones.
STOCK = Calibration(
    weight_share=0.72,
    state_share=0.92,
    cache_share=0.9,
    arithmetic_share=0.7,
    kernels_per_layer=10,
    kernel_seconds=1.45e-6,
    row_seconds=0.24e-6,
    tick_seconds=31e-6,
    all_reduce_seconds=23e-6,
    source=(
        "stock XLA on an H200 (driver 580, JAX 0.11.2), hand-written programs; "
        "arithmetic_share is a guess"
    ),
)
