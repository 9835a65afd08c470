"""Linen transformers: one model as a loop, as a scan, with rematerialisation, with dropout, with
shared weights.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tests.models.linen import variables_of
from tests.support.zoo_case import BATCH, VOCABULARY, WIDTH, Case, draw_tokens, language_model

HEADS = 4
SAVED = jax.checkpoint_policies.save_only_these_names("fed_forward")


def feed_forward(x: jax.Array) -> jax.Array:
    """Two dense layers; called within a compact method, whose module they become part of."""
    return nn.Dense(WIDTH, name="down")(nn.gelu(nn.Dense(2 * WIDTH, name="up")(x)))


class Block(nn.Module):
    """Attention and feed-forward, each on normed inputs; `cross` adds attention to a memory between
    them.
    """

    dropout: float = 0.0
    shared_mask: bool = False
    cross: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        memory: jax.Array | None = None,
        memory_mask: jax.Array | None = None,
    ) -> jax.Array:
        x = x + nn.MultiHeadDotProductAttention(HEADS, name="attention")(
            nn.LayerNorm()(x), mask=mask
        )
        if self.cross:
            attend = nn.MultiHeadDotProductAttention(HEADS, name="cross_attention")
            x = x + attend(nn.LayerNorm()(x), memory, mask=memory_mask)
        y = checkpoint_name(feed_forward(nn.LayerNorm()(x)), "fed_forward")
        return x + nn.Dropout(
            self.dropout, broadcast_dims=(0,) if self.shared_mask else (), deterministic=False
        )(y)


class GPT(nn.Module):
    """Causal, learned positions, the embedding tied to the logits."""

    depth: int = 6
    scan: bool = False
    remat: bool = False
    dropout: float = 0.0
    shared_mask: bool = False

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(VOCABULARY, WIDTH)
        positions = self.param("positions", nn.initializers.normal(), (tokens.shape[1], WIDTH))
        x = self.blocks(embed(tokens) + positions, nn.make_causal_mask(tokens))
        return embed.attend(nn.LayerNorm(name="final_norm")(x))

    def blocks(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        # Within a scan nothing can be merged with the recomputation, and the barrier against it
        # would only cost.
        block = nn.remat(Block, prevent_cse=not self.scan, policy=SAVED) if self.remat else Block
        options = {"dropout": self.dropout, "shared_mask": self.shared_mask}
        if self.scan:
            layers = nn.scan(
                lambda block, x, mask: (block(x, mask), None),
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=nn.broadcast,
                length=self.depth,
            )
            return layers(block(name="block", **options), x, mask)[0]
        for index in range(self.depth):
            x = block(name=f"block_{index}", **options)(x, mask)
        return x


def gpt_case(name: str, model: GPT, notes: str = "") -> Case:
    tokens = draw_tokens()
    return language_model(name, model.apply, variables_of(model, tokens), tokens, notes=notes)


def gpt() -> Case:
    return gpt_case("gpt", GPT())


def gpt_scan() -> Case:
    return gpt_case("gpt_scan", GPT(depth=8, scan=True), "one scan over stacked blocks")


def gpt_remat() -> Case:
    return gpt_case("gpt_remat", GPT(remat=True), "each block rematerialised")


def gpt_scan_remat() -> Case:
    return gpt_case(
        "gpt_scan_remat", GPT(depth=8, scan=True, remat=True), "a scan over rematerialised blocks"
    )


def dropout_case(name: str, model: GPT, notes: str, mixes_batch: bool = False) -> Case:
    def fn(params: Any, tokens: jax.Array, key: jax.Array) -> Any:
        return model.apply(params, tokens, rngs={"dropout": key})

    tokens = draw_tokens()
    params = variables_of(model.clone(dropout=0.0), tokens)
    inputs = (tokens, jax.random.key(5))
    return language_model(
        name, fn, params, *inputs, in_axes=(0, None), notes=notes, mixes_batch=mixes_batch
    )


def gpt_dropout() -> Case:
    return dropout_case(
        "gpt_dropout", GPT(depth=4, dropout=0.3), "one mask as large as the batch", mixes_batch=True
    )


def gpt_dropout_shared() -> Case:
    model = GPT(depth=4, dropout=0.3, shared_mask=True)
    return dropout_case("gpt_dropout_shared", model, "one mask for all examples")


def gpt_scan_dropout() -> Case:
    model = GPT(depth=8, scan=True, dropout=0.3, shared_mask=True)
    return dropout_case(
        "gpt_scan_dropout", model, "a scan over keys as well as blocks, one mask for all examples"
    )


def gpt_dropout_keys() -> Case:
    model = GPT(depth=4, dropout=0.3)

    def apply_to_one(params: Any, tokens: jax.Array, key: jax.Array) -> jax.Array:
        return model.apply(params, tokens[None], rngs={"dropout": key})[0]

    tokens = draw_tokens()
    params, keys = (
        variables_of(model.clone(dropout=0.0), tokens),
        jax.random.split(jax.random.key(5), BATCH),
    )
    fn = jax.vmap(apply_to_one, in_axes=(None, 0, 0))
    return language_model(
        "gpt_dropout_keys", fn, params, tokens, keys, notes="a key for each example"
    )


class EncoderDecoder(nn.Module):
    """One embedding for the source, the target and the logits; the decoder attends to the encoder's
    last layer.
    """

    depth: int = 3

    @nn.compact
    def __call__(self, source: jax.Array, target: jax.Array) -> jax.Array:
        embed = nn.Embed(VOCABULARY, WIDTH)
        memory, source_mask = embed(source), nn.make_attention_mask(source > 0, source > 0)
        for index in range(self.depth):
            memory = Block(name=f"encoder_{index}")(memory, source_mask)
        x, cross_mask = embed(target), nn.make_attention_mask(target > 0, source > 0)
        for index in range(self.depth):
            x = Block(cross=True, name=f"decoder_{index}")(
                x, nn.make_causal_mask(target), memory, cross_mask
            )
        return embed.attend(nn.LayerNorm(name="final_norm")(x))


def encoder_decoder() -> Case:
    # Sources of different lengths, so that the masks depend on the data.
    lengths = 2 + jnp.arange(BATCH) % 5
    source, target = draw_tokens(seed=2), draw_tokens(seed=3)
    source = jnp.where(jnp.arange(source.shape[1]) < lengths[:, None], source, 0)
    model = EncoderDecoder()
    params = variables_of(model, source, target)
    return language_model("encoder_decoder", model.apply, params, source, target, target=1)


class SharedBlocks(nn.Module):
    """The weights of one block, used eight times."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x, mask = nn.Embed(VOCABULARY, WIDTH)(tokens), nn.make_causal_mask(tokens)
        block = Block()
        for _ in range(8):
            x = block(x, mask)
        return nn.Dense(VOCABULARY)(nn.LayerNorm()(x))


def shared_blocks() -> Case:
    model, tokens = SharedBlocks(), draw_tokens()
    return language_model(
        "shared_blocks", model.apply, variables_of(model, tokens), tokens, notes="as in ALBERT"
    )
