"""Network of the experiment: dense decoder layers, one token of every sequence at a time.

A layer has attention of `heads` heads of 128 and a feed-forward of width `mlp`, without gates,
biases or parameters of its norms: 4 d^2 + 2 d mlp weights. Letters of shapes: b sequences, d width,
h heads, w width of a head, t context.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec, Sharding

from experiments.dense16 import paper

Params = dict[str, Any]
Cache = list[dict[str, Any]]
# Makes an array from its shape, its standard deviation and a number of its own.
Maker = Callable[[tuple[int, ...], float, int], Any]

TENSOR = "tensor"
EPSILON = 1e-6

# As Megatron splits a layer (arXiv:1909.08053): heads, and the wide side of the feed-forward.
BLOCK_SPECS = {
    "query_key_value": PartitionSpec(None, None, TENSOR),
    "out": PartitionSpec(TENSOR),
    "up": PartitionSpec(None, TENSOR),
    "down": PartitionSpec(TENSOR),
}
CACHE_SPEC = PartitionSpec(None, None, TENSOR)


@dataclass(frozen=True)
class Dense:
    """The network, with batch and context.

    Attributes:
      layers: how many.
      heads: heads of a layer; the width is heads * head_dim.
      mlp: width of the feed-forward.
      batch: sequences that are decoded together.
      context: positions that a sequence's cache has room for.
      dtype: of weights, cache and activations; norms and logits are float32.
      vocabulary: tokens there are.
      head_dim: of one head.
      attention: cuDNN's kernel, which takes 16-bit types on GPUs alone, or what XLA makes of
        products and sums.
    """

    layers: int
    heads: int
    mlp: int
    batch: int
    context: int
    dtype: str = "float32"
    vocabulary: int = 256
    head_dim: int = 128
    attention: Literal["cudnn", "xla"] = "xla"

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def layer_weights(self) -> int:
        """Weights of one layer."""
        return 4 * self.width**2 + 2 * self.width * self.mlp

    @property
    def layer_bytes(self) -> int:
        return self.layer_weights * self.itemsize

    @property
    def sequence_bytes(self) -> int:
        """Bytes of one sequence's cache in one layer, with all of its context."""
        return 2 * self.context * self.width * self.itemsize

    @property
    def itemsize(self) -> int:
        return jnp.dtype(self.dtype).itemsize

    def record(self) -> dict[str, Any]:
        """Fields of a record that describe the model."""
        names = ("layers", "heads", "mlp", "dtype", "vocabulary", "head_dim", "attention")
        return {name: getattr(self, name) for name in names}

    def block_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of one layer's weights."""
        return {
            "query_key_value": (self.width, 3, self.heads, self.head_dim),
            "out": (self.heads, self.head_dim, self.width),
            "up": (self.width, self.mlp),
            "down": (self.mlp, self.width),
        }

    def params(self, make: Maker) -> Params:
        """The parameters, as `make` makes them."""
        count = iter(range(2 + len(BLOCK_SPECS) * self.layers))
        blocks = [
            {
                name: make(shape, _fan_in(name, shape) ** -0.5, next(count))
                for name, shape in self.block_shapes().items()
            }
            for _ in range(self.layers)
        ]
        embed = make((self.vocabulary, self.width), 1.0, next(count))
        return {
            "embed": embed,
            "blocks": blocks,
            "head": make((self.width, self.vocabulary), self.width**-0.5, next(count)),
        }

    def cache(self, sequences: int, make: Maker) -> Cache:
        """Cache of `count` sequences, made by `make` as the parameters are."""
        shape = (sequences, self.context, self.heads, self.head_dim)
        return [
            {name: make(shape, 1.0, 2 * i + j) for j, name in enumerate("kv")}
            for i in range(self.layers)
        ]

    def abstract(
        self, shape: tuple[int, ...], scale: float = 1.0, number: int = 0
    ) -> jax.ShapeDtypeStruct:
        """Maker of types instead of arrays, for `params` and `cache`."""
        return jax.ShapeDtypeStruct(shape, self.dtype)

    def param_specs(self) -> Any:
        """Partition specs of the parameters over the axis `tensor`."""
        whole = PartitionSpec()
        return {"embed": whole, "blocks": [dict(BLOCK_SPECS)] * self.layers, "head": whole}

    def step(
        self, params: Params, cache: Cache, tokens: Any, positions: Any, axis: str | None = None
    ) -> tuple[Any, Cache]:
        """One token of every sequence: (logits float32[b, vocabulary], cache).

        Parameters and cache are whole, or the shards of one device; `axis` is the mesh axis over
        which layers are split, if they are. tokens and positions are int32[b]; past the context's
        end, its last place is written again.
        """
        x, new = params["embed"][tokens], []
        positions = jnp.minimum(positions, self.context - 1)
        for i, (block, held) in enumerate(zip(params["blocks"], cache, strict=True)):
            with jax.named_scope(f"block{i}"):
                x, held = self.block(block, held, x, positions, axis)
            new.append(held)
        with jax.named_scope("head"):
            return self.logits(params, x), new

    def logits(self, params: Params, x: Any) -> Any:
        """float32[b, vocabulary] of x[b, d]."""
        return _product(_norm(x), params["head"]).astype(jnp.float32)

    def block(
        self,
        block: Mapping[str, Any],
        cache: Mapping[str, Any],
        x: Any,
        positions: Any,
        axis: str | None = None,
    ) -> tuple[Any, Any]:
        """One layer: (x[b, d], its cache)."""
        mixed = _product(_norm(x), block["query_key_value"])
        query, key, value = (mixed[:, j] for j in range(3))
        cache = {
            "k": _written(cache["k"], key, positions),
            "v": _written(cache["v"], value, positions),
        }
        attended = self._attend(query, cache["k"], cache["v"], positions)
        x = x + _summed(_product(attended, block["out"]), axis)
        hidden = jax.nn.gelu(_product(_norm(x), block["up"]))
        return x + _summed(_product(hidden, block["down"]), axis), cache

    def _attend(self, query: Any, keys: Any, values: Any, positions: Any) -> Any:
        """Attention of one query per sequence [b, h, w] to the cached positions up to its own, [b,
        t, h, w].
        """
        if self.attention == "cudnn":
            lengths = positions + 1
            attended = jax.nn.dot_product_attention(
                query[:, None], keys, values, key_value_seq_lengths=lengths, implementation="cudnn"
            )
            return attended[:, 0]
        # A multiplication and a sum read keys and values where they lie; as products they would be
        # transposed first.
        q, k, v = (x.astype(jnp.float32) for x in (query, keys, values))
        scores = jnp.sum(q[:, None] * k, axis=-1) * self.head_dim**-0.5
        seen = jnp.arange(self.context) <= positions[:, None]
        weights = jax.nn.softmax(jnp.where(seen[:, :, None], scores, -jnp.inf), axis=1)
        return jnp.sum(weights[..., None] * v, axis=1).astype(query.dtype)


PRESETS = {
    "paper": Dense(
        paper.LAYERS,
        paper.HEADS,
        paper.MLP,
        batch=paper.BATCH,
        context=paper.CONTEXT,
        dtype="float16",
        attention="cudnn",
    ),
    "exact": Dense(4, 32, 16_384, batch=32, context=10_000, dtype="bfloat16", attention="cudnn"),
    "l2": Dense(4, 8, 4096, batch=32, context=128, dtype="bfloat16", attention="cudnn"),
    "tiny": Dense(4, 4, 64, batch=16, context=32, vocabulary=61, head_dim=8),
}


def random_array(model: Dense, seed: int, sharding: Sharding) -> Maker:
    """Maker of random arrays, drawn on the devices that hold them; equal numbers for any
    sharding.
    """

    def make(shape: tuple[int, ...], scale: float, number: int) -> jax.Array:
        return _drawer(shape, model.dtype, sharding)(np.array([seed, number], np.uint32), scale)

    return make


@cache
def _drawer(shape: tuple[int, ...], dtype: str, sharding: Sharding) -> Callable[..., jax.Array]:
    return jax.jit(
        lambda data, scale: _draw(jax.random.wrap_key_data(data), scale, shape, dtype),
        out_shardings=sharding,
    )


def _draw(key: Any, scale: Any, shape: tuple[int, ...], dtype: str) -> Any:
    # Uniform numbers, which take one pass, of the variance scale^2.
    return jax.random.uniform(key, shape, dtype, -1, 1) * jnp.asarray(scale * np.sqrt(3), dtype)


def _fan_in(name: str, shape: tuple[int, ...]) -> int:
    return shape[0] * shape[1] if name == "out" else shape[0]


def _norm(x: Any) -> Any:
    x32 = x.astype(jnp.float32)
    return (x32 * lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + EPSILON)).astype(x.dtype)


def _product(x: Any, weight: Any) -> Any:
    """Product over all axes of x but the first."""
    summed = tuple(range(1, x.ndim))
    return lax.dot_general(x, weight, ((summed, tuple(j - 1 for j in summed)), ((), ())))


def _summed(x: Any, axis: str | None) -> Any:
    return x if axis is None else lax.psum(x, axis)


def _written(cache: Any, rows: Any, positions: Any) -> Any:
    """Cache [b, t, h, w] with the row [b, h, w] written at every sequence's position, in place."""
    sequences = jnp.arange(cache.shape[0])
    at = cache.at[sequences, positions]
    return at.set(rows, mode="promise_in_bounds", indices_are_sorted=True, unique_indices=True)
