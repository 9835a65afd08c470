"""GPT in plain JAX with a choice of sharding and attention kernel, and its training FLOPs."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

Params = dict[str, Any]
AttentionKernel = Literal["cudnn", "xla"]
Hook = Callable[[jax.Array], jax.Array]

EPSILON = 1e-5


def _as_it_is(x: jax.Array) -> jax.Array:
    return x


@dataclass(frozen=True)
class Sharding:
    """Sharding constraints of a strategy; by default none.

    Attributes:
      hidden: applied to float[batch, tokens, width] between blocks.
      weight: applied to every weight in the dtype that it is computed in.
      attention: makes of an attention on one device's examples and heads one on all of them.
    """

    hidden: Hook = _as_it_is
    weight: Hook = _as_it_is
    attention: Callable[[Callable[..., jax.Array]], Callable[..., jax.Array]] = lambda attend: (
        attend
    )


UNSHARDED = Sharding()


@dataclass(frozen=True)
class Model:
    """Causal transformer: learned positions, pre-norm blocks, tied embedding.

    Attributes:
      depth: blocks.
      width: features of a token; `heads` divides it.
      heads: heads of attention.
      vocabulary: tokens that there are.
      sequence: tokens that are predicted in an example.
      attention: the kernel of attention: cuDNN's flash attention, or XLA's operations, recomputed
        in backward.
    """

    depth: int
    width: int
    heads: int
    vocabulary: int
    sequence: int
    attention: AttentionKernel

    @property
    def num_parameters(self) -> int:
        return sum(x.size for x in jax.tree.leaves(self.shapes()))

    def shapes(self) -> Params:
        """Types of the parameters: `jax.ShapeDtypeStruct`, float32."""

        def shape(*sizes: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(sizes, jnp.float32)

        width, split = self.width, (self.heads, self.width // self.heads)
        block = {
            "norm_1": shape(width),
            "query": shape(width, *split),
            "key": shape(width, *split),
            "value": shape(width, *split),
            "out": shape(*split, width),
            "norm_2": shape(width),
            "up": shape(width, 4 * width),
            "down": shape(4 * width, width),
        }
        return {
            "embed": {"table": shape(self.vocabulary, width)},
            "positions": {"table": shape(self.sequence, width)},
            **{f"block_{index}": block for index in range(self.depth)},
            "norm": {"scale": shape(width)},
        }

    def initial(self, seed: int = 0) -> Params:
        """Parameters drawn as GPT-2 draws them, normal with 0.02; norms are ones. In host
        memory.
        """
        shapes, tree = jax.tree.flatten(self.shapes())
        seeds = np.random.SeedSequence(seed).spawn(len(shapes))

        def draw(shape: jax.ShapeDtypeStruct, own: np.random.SeedSequence) -> np.ndarray:
            if len(shape.shape) == 1:
                return np.ones(shape.shape, np.float32)
            return np.random.default_rng(own).standard_normal(shape.shape, np.float32) * np.float32(
                0.02
            )

        with ThreadPoolExecutor() as threads:
            return jax.tree.unflatten(tree, list(threads.map(draw, shapes, seeds)))

    def loss(self, params: Params, tokens: jax.Array, sharding: Sharding = UNSHARDED) -> jax.Array:
        """The mean cross-entropy (nats a token) of int[batch, sequence + 1].

        Blocks and logits are computed in bfloat16, norms and the loss in float32.
        """
        table = sharding.weight(params["embed"]["table"].astype(jnp.bfloat16))
        positions = sharding.weight(params["positions"]["table"].astype(jnp.bfloat16))
        x = sharding.hidden(table[tokens[:, :-1]] + positions)
        for index in range(self.depth):
            x = self._block(params[f"block_{index}"], x, sharding)
        x = _norm(x, sharding.weight(params["norm"]["scale"]))
        logits = jnp.einsum("btw,vw->btv", x, table, preferred_element_type=jnp.float32)
        return _cross_entropy(logits, tokens[:, 1:])

    def _block(self, master: Params, x: jax.Array, sharding: Sharding) -> jax.Array:
        scales = [sharding.weight(master[name]) for name in ("norm_1", "norm_2")]
        narrow = {
            name: sharding.weight(x.astype(jnp.bfloat16))
            for name, x in master.items()
            if x.ndim > 1
        }
        normed = _norm(x, scales[0])
        heads = [
            jnp.einsum("btw,whd->bthd", normed, narrow[name]) for name in ("query", "key", "value")
        ]
        mixed = sharding.attention(self._attend)(*heads)
        x = sharding.hidden(x + jnp.einsum("bthd,hdw->btw", mixed, narrow["out"]))
        wide = jax.nn.gelu(jnp.einsum("btw,wf->btf", _norm(x, scales[1]), narrow["up"]))
        return sharding.hidden(x + jnp.einsum("btf,fw->btw", wide, narrow["down"]))

    @property
    def _attend(self) -> Callable[..., jax.Array]:
        """Causal attention of three bfloat16[batch, tokens, heads, features]."""
        attend = partial(
            jax.nn.dot_product_attention, is_causal=True, implementation=self.attention
        )
        # XLA's operations would keep tokens x tokens probabilities a head; cuDNN's kernel
        # recomputes them by itself.
        return attend if self.attention == "cudnn" else jax.checkpoint(attend)

    @property
    def block_flops(self) -> float:
        """Of forward and backward through a block, a token; see `step_flops`."""
        return 6.0 * 12 * self.width**2 + 6 * self.width * self.sequence

    @property
    def logits_flops(self) -> float:
        """Of forward and backward through the logits, a token; see `step_flops`."""
        return 6.0 * self.vocabulary * self.width

    def step_flops(self, examples: int) -> float:
        """Floating-point operations that a training step needs, whatever is computed twice left
        out.

        6 a parameter and token (Kaplan et al., arXiv:2001.08361, section 2.1), the tied table
        counted once, for the logits, and for attention 12 x depth x width x sequence a token (PaLM,
        arXiv:2204.02311, appendix B), of which causality leaves half.
        """
        return examples * self.sequence * (self.depth * self.block_flops + self.logits_flops)


def draw_batches(model: Model, examples: int, count: int, seed: int = 1) -> np.ndarray:
    """int32[count, examples, sequence + 1]: every second token follows from the one before, so that
    a loss can fall.
    """
    tokens = np.random.default_rng(seed).integers(
        0, model.vocabulary, (count, examples, model.sequence + 1)
    )
    followers = tokens[..., 1::2]
    followers[...] = (7 * tokens[..., ::2][..., : followers.shape[-1]] + 3) % model.vocabulary
    return tokens.astype(np.int32)


def _norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Root-mean-square normalisation, in float32, of bfloat16[..., width]."""
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + EPSILON)
    return (wide * inverse * scale).astype(x.dtype)


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over tokens. By comparison, not by indexing: logits may be sharded over the
    vocabulary.
    """
    numbers = jax.lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1)
    chosen = jnp.sum(jnp.where(numbers == labels[..., None], logits, 0.0), axis=-1)
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)
