"""How far real programs stay behind a device's figures, in a few constants, each with its
source.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field

from layerwise_jax import _json

SHARES = ("weight_share", "state_share", "cache_share", "arithmetic_share")


@dataclass(frozen=True)
class Calibration:
    """What compiled programs reach of a device's figures, and what they pay on top.

    Attributes:
      weight_share: of the memory's bandwidth, where a product with few rows reads its weights.
      state_share: of the memory's bandwidth, where attention reads its cache.
      cache_share: of the cache's bandwidth, where a product reads weights that are resident.
      arithmetic_share: of the device's rate, where a product has many rows.
      kernels_per_layer: kernels that a layer is compiled to.
      kernel_seconds: what a kernel takes besides reading and computing: its launch, its first and
        its last wave.
      row_seconds: what one more example takes in a layer besides bytes and arithmetic: softmax,
        cache update.
      tick_seconds: a turn of the compiled loop, with what is outside of the layers (embedding,
        head, sampling).
      all_reduce_seconds: an all-reduce of a few bytes.
      source: where the figures are from.
      permute_seconds: what stages take to exchange a few bytes, on top of a tick; None for the
        device's `link_latency`.
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
                raise ValueError(f"{each.name} is {value}; a share above 0 and up to 1 is wanted.")
            if each.name != "source" and value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{each.name} is {value}; a number of at least 0 is wanted.")

    def to_json(self) -> str:
        """The constants as JSON text; `from_json` reads it back."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """A calibration from `to_json`.

        Raises:
          ValueError: not JSON, or with fields missing, unknown or of the wrong type.
        """
        return _json.read(cls, text)


# Stock XLA on an H200, hand-written programs. All but cache_share, arithmetic_share and
# kernels_per_layer, which were held, is fitted (`simulate_fit`) to thirteen measurements: four
# layers of d = 1024 and of d = 4096 on one device, two tensor ways and two stages, and one layer of
# d = 4096 at four microbatches. It predicts them to within 11 %. cache_share: products of 8 MiB
# take 1.0 to 1.7 us less where they are resident than where they stream.
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
