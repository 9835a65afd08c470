"""Models with cuDNN's attention are staged. Without a GPU they are traced, not run."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh

from layerwise_jax.batch.analysis import BatchError
from layerwise_jax.build import build_pipeline
from layerwise_jax.decode.build import decode_ring
from layerwise_jax.trace.layers import trace_layers

HEADS, HEAD_WIDTH, LENGTH, VOCABULARY = 2, 64, 128, 31
WIDTH = HEADS * HEAD_WIDTH


@pytest.fixture(autouse=True)
def cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX asks for cuDNN when it traces."""
    module = "jax._src.cudnn.fused_attention_stablehlo"
    monkeypatch.setattr(f"{module}.check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(f"{module}.check_compute_capability", lambda *_: True)


def attention(q: Any, k: Any, v: Any, **options: Any) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **options)


def weights(num_layers: int) -> Any:
    block = {"qkv": jax.ShapeDtypeStruct((WIDTH, 3, HEADS, HEAD_WIDTH), jnp.bfloat16)}
    ends = jax.ShapeDtypeStruct((VOCABULARY, WIDTH), jnp.bfloat16)
    return {"embed": ends, "blocks": [block] * num_layers, "head": ends}


def step(params: Any, cache: Any, tokens: Any, positions: Any) -> tuple[Any, Any]:
    x, new, rows = params["embed"][tokens], [], jnp.arange(tokens.shape[0])
    for block, held in zip(params["blocks"], cache, strict=True):
        q, k, v = jnp.moveaxis(jnp.tensordot(x, block["qkv"], 1), 1, 0)
        keys, values = held["k"].at[rows, positions].set(k), held["v"].at[rows, positions].set(v)
        mixed = attention(q[:, None], keys, values, key_value_seq_lengths=positions + 1)
        x = x + mixed.reshape(x.shape)
        new.append({"k": keys, "v": values})
    return x @ params["head"].T, new


def test_a_step_is_a_ring_with_its_layers_in_common() -> None:
    held = jax.ShapeDtypeStruct((2, LENGTH, HEADS, HEAD_WIDTH), jnp.bfloat16)
    ring = decode_ring(step, weights(4), [{"k": held, "v": held}] * 4, group_size=2, num_stages=2)
    assert ring.ring.loop.alignment.num_layers == 2
    assert ring.sequences_are_independent


def loss(params: Any, tokens: jax.Array, axes: tuple[int, int]) -> jax.Array:
    x = params["embed"][tokens]
    for block in params["blocks"]:
        q, k, v = (
            jnp.swapaxes(y, *axes) for y in jnp.moveaxis(jnp.tensordot(x, block["qkv"], 1), 2, 0)
        )
        x = x + jnp.swapaxes(attention(q, k, v, is_causal=True), *axes).reshape(x.shape)
    return jnp.mean((x @ params["head"].T).astype(jnp.float32) ** 2)


@pytest.mark.parametrize("axes", [(0, 0), (0, 1)])
def test_examples_attend_to_themselves_alone(
    axes: tuple[int, int], stage_mesh: Callable[..., Mesh]
) -> None:
    def model(params: Any, tokens: jax.Array) -> jax.Array:
        return loss(params, tokens, axes)

    layers = trace_layers(model, weights(4), jax.ShapeDtypeStruct((2, LENGTH), jnp.int32))
    if axes == (0, 0):
        pipeline = build_pipeline(layers, (0, 3, 6), stage_mesh(2), 4, reduce="mean")
        assert pipeline.loop.alignment.num_layers == 2
    else:
        with pytest.raises(BatchError, match="attends to other examples"):
            build_pipeline(layers, (0, 3, 6), stage_mesh(2), 4, reduce="mean")
