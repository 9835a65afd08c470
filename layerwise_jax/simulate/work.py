"""Work of a step: bytes and FLOPs of each layer, independent of devices."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

from layerwise_jax._arguments import checked_choice

WorkKind = Literal["decode", "forward", "training"]
WORK_KINDS = ("decode", "forward", "training")

# All-reduces of a layer split over tensor ways: after attention and after its MLP (Megatron-LM).
ALL_REDUCES_PER_LAYER = 2
# Bytes of one entry, by the beginning of its dtype's name.
ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "tensorfloat32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8": 1,
    "int8": 1,
    "complex128": 16,
    "complex64": 8,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "uint64": 8,
    "uint32": 4,
    "uint16": 2,
    "uint8": 1,
    "bool": 1,
}


@dataclass(frozen=True)
class LayerWork:
    """Work of one layer. In decoding, an example is a sequence and gets one token a step.

    Attributes:
      name: name of the layer.
      weight_bytes: bytes of its weights.
      flops: floating-point operations of one example.
      send_bytes: bytes of one example's output, which is sent to the next layer and which an
        all-reduce sums.
      activation_bytes: bytes of one example's output and workspace.
      state_bytes: bytes of one example's key-value cache, read once a step.
      lookup_bytes: bytes of weights of which a pass reads just some rows (embedding tables).
      kernels: kernels of the compiled layer; None for the calibration's number.
      all_reduces: all-reduces if the layer is split over tensor ways.
    """

    name: str
    weight_bytes: float
    flops: float
    send_bytes: float
    activation_bytes: float = 0.0
    state_bytes: float = 0.0
    lookup_bytes: float = 0.0
    kernels: float | None = None
    all_reduces: int = ALL_REDUCES_PER_LAYER

    def __post_init__(self) -> None:
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(
                    f"{field.name} of layer '{self.name}' must be finite and at least 0, got "
                    f"{value}."
                )

    @property
    def read_bytes(self) -> float:
        """Bytes of weights that every pass reads."""
        return max(self.weight_bytes - self.lookup_bytes, 0.0)


@dataclass(frozen=True)
class StepWork:
    """Work of one step of a model.

    Attributes:
      layers: layers in order.
      batch: examples of a step.
      kind: "decode" for one token of each sequence, "forward" for one pass, "training" for forward
        and backward.
      dtype: dtype of the operands of matrix products.
      tokens: tokens of an example in a step.
      tensor_ways: a multiple of every number of tensor ways (the number of heads); None for no
        limit.
      weight_dtype: dtype of the weights; None for `dtype`.
    """

    layers: tuple[LayerWork, ...]
    batch: int
    kind: WorkKind
    dtype: str
    tokens: int = 1
    tensor_ways: int | None = None
    weight_dtype: str | None = None

    def __post_init__(self) -> None:
        if not self.layers or self.batch < 1 or self.tokens < 1:
            raise ValueError(
                "layers, batch and tokens must be at least 1, got "
                f"{len(self.layers)} layers, a batch of {self.batch} and {self.tokens} tokens."
            )
        checked_choice("kind", self.kind, WORK_KINDS)

    @property
    def weight_item_bytes(self) -> int:
        """Bytes of one weight."""
        return item_bytes(self.weight_dtype or self.dtype)

    @property
    def read_bytes(self) -> float:
        """Bytes of all layers' weights that are read at least once a step."""
        return sum(layer.read_bytes for layer in self.layers)

    @property
    def state_bytes(self) -> float:
        """Bytes of the key-value caches of all layers and examples."""
        return self.batch * sum(layer.state_bytes for layer in self.layers)

    @property
    def is_uniform(self) -> bool:
        """True if all layers have the same figures."""
        first = self.layers[0]
        figures = [field.name for field in fields(first)[1:]]
        return all(
            getattr(layer, name) == getattr(first, name)
            for layer in self.layers
            for name in figures
        )


def dense_decode(
    layers: int = 16,
    heads: int = 32,
    head_dim: int = 128,
    mlp: int = 16384,
    batch: int = 128,
    context: int = 10_000,
    dtype: str = "float16",
) -> StepWork:
    """Decode step of a dense transformer, by default the 16-layer one.

    It makes one token for each of `batch` sequences of `context` tokens. A layer has four square
    matrices for attention and two for its MLP, 4 d d + 2 d mlp weights for d = heads x head_dim,
    and a cache of 2 d numbers a token.
    """
    d = heads * head_dim
    item = item_bytes(dtype)
    weights = 4 * d * d + 2 * d * mlp
    layer = LayerWork(
        name="block",
        weight_bytes=weights * item,
        # Two operations for each weight, and two for each number of the cache, which is multiplied
        # by queries or scores.
        flops=2 * weights + 4 * d * context,
        send_bytes=d * item,
        activation_bytes=(5 * d + mlp) * item,
        state_bytes=2 * d * context * item,
    )
    return StepWork((layer,) * layers, batch, "decode", dtype, tensor_ways=heads)


def dense_prefill(
    layers: int = 16,
    heads: int = 32,
    head_dim: int = 128,
    mlp: int = 16384,
    batch: int = 128,
    context: int = 10_000,
    dtype: str = "float16",
) -> StepWork:
    """Prefill of the model of `dense_decode`: prompts of `context` tokens with causal attention.

    Causal attention computes half of all pairs of tokens.
    """
    d = heads * head_dim
    item = item_bytes(dtype)
    weights = 4 * d * d + 2 * d * mlp
    layer = LayerWork(
        name="block",
        weight_bytes=weights * item,
        flops=2 * weights * context + 2 * d * context**2,
        send_bytes=d * context * item,
        activation_bytes=(5 * d + mlp) * context * item,
    )
    return StepWork((layer,) * layers, batch, "forward", dtype, tokens=context, tensor_ways=heads)


def item_bytes(dtype: str) -> int:
    """Bytes of one entry of a dtype.

    Raises:
      ValueError: an unknown dtype.
    """
    found = [size for name, size in ITEM_BYTES.items() if dtype.startswith(name)]
    if not found:
        raise ValueError(f"dtype must begin with one of {', '.join(ITEM_BYTES)}, got {dtype!r}.")
    return found[0]
