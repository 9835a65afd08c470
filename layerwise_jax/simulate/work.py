"""What a step of a model has to do, in plain numbers, whatever it runs on."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

WorkKind = Literal["decode", "forward", "training"]
WORK_KINDS = ("decode", "forward", "training")

# A layer split over tensor ways adds up its parts twice, after attention and after its MLP
# (Megatron-LM).
ALL_REDUCES_PER_LAYER = 2
ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "tensorfloat32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8": 1,
    "int8": 1,
}
ITEM_BYTES |= {"complex128": 16, "complex64": 8, "int64": 8, "int32": 4, "int16": 2}
ITEM_BYTES |= {"uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1, "bool": 1}


@dataclass(frozen=True)
class LayerWork:
    """What one layer does. An example is a sequence in decoding, where it gets one token a step.

    Attributes:
      name: the layer.
      weight_bytes: bytes of its weights.
      flops: floating-point operations of one example.
      send_bytes: bytes of one example's output: what is sent to the next layer, and what an
        all-reduce sums.
      activation_bytes: bytes of one example that it writes on the way, its output and workspace.
      state_bytes: bytes of one example's cache, held all the time and read once a step.
      lookup_bytes: of its weights, those that no pass reads as a whole, but some rows at a time (an
        embedding table).
      kernels: kernels that it is compiled to; None for as many as the calibration says.
      all_reduces: sums over tensor ways, if it is split.
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
                    f"{field.name} of layer '{self.name}' is {value}; a number of at least 0 is "
                    "wanted."
                )

    @property
    def read_bytes(self) -> float:
        """Of its weights, what every pass reads."""
        return max(self.weight_bytes - self.lookup_bytes, 0.0)


@dataclass(frozen=True)
class StepWork:
    """A step of a model.

    Attributes:
      layers: its layers, in order.
      batch: examples.
      kind: "decode" is one token for each sequence, "forward" one pass, "training" forward and
        backward.
      dtype: of the operands of its matrix products.
      tokens: tokens of an example in a step.
      tensor_ways: the most devices that a layer can be split over (its number of heads); None for
        no limit.
      weight_dtype: what weights are kept in; None for `dtype`.
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
                f"{len(self.layers)} layers, a batch of {self.batch}, {self.tokens} tokens an "
                "example; "
                "at least one of each is wanted."
            )
        if self.kind not in WORK_KINDS:
            raise ValueError(f"kind is {self.kind!r}; one of {', '.join(WORK_KINDS)} is wanted.")

    @property
    def weight_item_bytes(self) -> int:
        """Bytes of one weight."""
        return item_bytes(self.weight_dtype or self.dtype)

    @property
    def read_bytes(self) -> float:
        """Of the weights of all layers, what is read at least once a step."""
        return sum(layer.read_bytes for layer in self.layers)

    @property
    def state_bytes(self) -> float:
        """Of all layers and examples."""
        return self.batch * sum(layer.state_bytes for layer in self.layers)

    @property
    def is_uniform(self) -> bool:
        """Whether all layers do the same."""
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
    """One token for each of `batch` sequences that are `context` tokens long; by default the
    16-layer dense model.

    A layer has four square matrices for attention and two for its MLP, 4 d d + 2 d mlp weights for
    d = heads x head_dim, and a cache of 2 d numbers a token.
    """
    d, item = heads * head_dim, item_bytes(dtype)
    weights = 4 * d * d + 2 * d * mlp
    layer = LayerWork(
        name="block",
        weight_bytes=weights * item,
        # Two operations a weight; two for each number of the cache, by which queries and scores are
        # multiplied.
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
    """The same model reading prompts of `context` tokens, attention being causal: half of all pairs
    of tokens.
    """
    d, item = heads * head_dim, item_bytes(dtype)
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
    """Bytes of one number.

    Raises:
      ValueError: no such dtype is known here.
    """
    found = [size for name, size in ITEM_BYTES.items() if dtype.startswith(name)]
    if not found:
        raise ValueError(f"dtype is {dtype!r}; one of {', '.join(ITEM_BYTES)} is wanted.")
    return found[0]
