"""Steps of small models for rings, and the loop that a ring is held to: every prompt by itself,
unstaged.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from layerwise_jax.decode.build import decode_ring
from layerwise_jax.decode.ring import DecodeRing
from layerwise_jax.decode.sampling import Sampler

VOCABULARY, WIDTH, CONTEXT, NEW = 31, 16, 24, 6
STOP = 3

Step = Callable[[Any, Any, Any, Any], tuple[Any, Any]]


def draw(*shape: int) -> jax.Array:
    return jnp.asarray(
        np.random.default_rng(sum(shape)).normal(size=shape) / np.sqrt(shape[0]), jnp.float32
    )


def gpt(layers: int) -> dict[str, Any]:
    blocks = [
        {name: (i + 1.0) ** 0.1 * draw(*shape) for name, shape in SHAPES.items()}
        for i in range(layers)
    ]
    return {"embed": 3 * draw(VOCABULARY, WIDTH), "blocks": blocks, "head": draw(WIDTH, VOCABULARY)}


SHAPES = {
    "qkv": (WIDTH, 3 * WIDTH),
    "out": (WIDTH, WIDTH),
    "up": (WIDTH, 2 * WIDTH),
    "down": (2 * WIDTH, WIDTH),
}


def gpt_cache(layers: int, sequences: int) -> list[Any]:
    return [{name: jnp.zeros((sequences, CONTEXT, WIDTH)) for name in "kv"} for _ in range(layers)]


def write(buffer: jax.Array, row: jax.Array, positions: jax.Array) -> jax.Array:
    return jax.vmap(lambda buffer, row, at: lax.dynamic_update_slice(buffer, row[None], (at, 0)))(
        buffer, row, positions
    )


def gpt_block(block: Any, held: Any, x: jax.Array, positions: Any) -> tuple[jax.Array, Any]:
    query, key, value = jnp.split(x @ block["qkv"], 3, axis=-1)
    keys, values = write(held["k"], key, positions), write(held["v"], value, positions)
    scores = jnp.einsum("bd,btd->bt", query, keys) / 4
    seen = jnp.arange(CONTEXT)[None] <= positions[:, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e9))
    x = x + jnp.einsum("bt,btd->bd", weights, values) @ block["out"]
    x = x + jnp.tanh(x @ block["up"]) @ block["down"]
    return x, {"k": keys, "v": values}


def gpt_step(params: Any, cache: Any, tokens: Any, positions: Any) -> tuple[Any, Any]:
    """Explicit caches by position, a row a sequence."""
    x, new = params["embed"][tokens], []
    for block, held in zip(params["blocks"], cache, strict=True):
        x, held = gpt_block(block, held, x, positions)
        new.append(held)
    return x @ params["head"], new


def scanned_gpt_step(params: Any, cache: Any, tokens: Any, positions: Any) -> tuple[Any, Any]:
    """The same, its weights and caches stacked over layers."""

    def body(x: Any, of_layer: Any) -> tuple[Any, Any]:
        return gpt_block(*of_layer, x, positions)

    x, new = lax.scan(body, params["embed"][tokens], (params["blocks"], cache))
    return x @ params["head"], new


def stacked(layers: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def recurrent_step(params: Any, cache: Any, tokens: Any, positions: Any) -> tuple[Any, Any]:
    """A state that every token changes: what an idle stage wrote would stay."""
    x, new = params["embed"][tokens], []
    for block, held in zip(params["blocks"], cache, strict=True):
        state = jnp.tanh(held @ block["out"] + x)
        x = x + state
        new.append(state)
    return x @ params["embed"].T, new


@jax.custom_vjp
def forward_only(x: jax.Array) -> jax.Array:
    """A kernel without a usable derivative, as cuDNN's attention of one query is."""
    return jnp.tanh(x)


def _refuse(*_: Any) -> Any:
    raise NotImplementedError("There is no derivative.")


forward_only.defvjp(_refuse, _refuse)


def closed_step(params: Any, cache: Any, tokens: Any, positions: Any) -> tuple[Any, Any]:
    """Kernels without derivatives, and a norm between the last block and the head."""
    x, new = params["embed"][tokens], []
    for block, held in zip(params["blocks"], cache, strict=True):
        state = forward_only(held @ block["out"] + x)
        x = x + state @ block["qkv"][:, :WIDTH]
        new.append(state)
    return (x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)) @ params["head"], new


def counting_step(params: Any, cache: Any, tokens: Any, positions: Any) -> tuple[Any, Any]:
    """A counter that all sequences share, as Linen's `cache_index`."""
    x, new = params["embed"][tokens], []
    for block, held in zip(params["blocks"], cache, strict=True):
        x = jnp.tanh((x + held["sum"]) @ block["out"]) + jnp.sin(held["index"].astype(jnp.float32))
        new.append({"index": held["index"] + 1, "sum": held["sum"] + x})
    return x @ params["head"], new


def recurrent_cache(layers: int, sequences: int) -> list[Any]:
    return [jnp.zeros((sequences, WIDTH)) for _ in range(layers)]


def counting_cache(layers: int, sequences: int) -> list[Any]:
    return [{"index": jnp.int32(0), "sum": jnp.zeros((sequences, WIDTH))} for _ in range(layers)]


MODELS: dict[str, tuple[Step, Callable[[int, int], Any]]] = {
    "gpt": (gpt_step, gpt_cache),
    "recurrent": (recurrent_step, recurrent_cache),
    "closed": (closed_step, recurrent_cache),
    "counting": (counting_step, counting_cache),
}


def unstaged(
    model: str,
    layers: int,
    prompts: Sequence[np.ndarray],
    sampler: Sampler | None = None,
    keys: Any = None,
    stop_tokens: Sequence[int] = (STOP,),
) -> list[np.ndarray]:
    """Every prompt by itself, a token at a time."""
    step, make_cache = MODELS[model]
    sampler, params, run, found = sampler or Sampler(), gpt(layers), jax.jit(step), []
    for i, prompt in enumerate(prompts):
        cache, token, new = make_cache(layers, 1), prompt[0], []
        key = jnp.zeros((1, 2), jnp.uint32) if keys is None else jax.random.key_data(keys[i])[None]
        for position in range(len(prompt) - 1 + NEW):
            logits, cache = run(params, cache, jnp.asarray([token]), jnp.asarray([position]))
            sampled = int(sampler(logits, key, jnp.asarray([position]))[0])
            token = prompt[position + 1] if position + 1 < len(prompt) else sampled
            if position + 1 >= len(prompt):
                new.append(sampled)
                if sampled in stop_tokens:
                    break
        found.append(np.asarray(new))
    return found


def make_ring(
    model: str, layers: int, num_stages: int, group_size: int, abstract: bool = True, **options: Any
) -> DecodeRing:
    step, make_cache = MODELS[model]
    cache = make_cache(layers, group_size)
    if abstract:
        cache = jax.eval_shape(lambda: cache)
    options = {"stop_tokens": (STOP,), "num_stages": num_stages, **options}
    return decode_ring(step, gpt(layers), cache, group_size=group_size, **options)


def prompts_for(ring: DecodeRing, more: int = 0, same_length: bool = False) -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    lengths = [
        3 if same_length else int(rng.integers(1, 5)) for _ in range(ring.num_sequences + more)
    ]
    return [rng.integers(0, VOCABULARY, size=length) for length in lengths]


def assert_same_tokens(got: Sequence[np.ndarray], want: Sequence[np.ndarray]) -> None:
    assert [list(tokens) for tokens in got] == [list(tokens) for tokens in want]


def tensor_step(params: Any, cache: Any, tokens: Any, positions: Any) -> tuple[Any, Any]:
    """A layer whose wide side is split over `tensor`; its cache too."""
    x, new = params["embed"][tokens], []
    for block, held in zip(params["blocks"], cache, strict=True):
        wide = jnp.tanh(x @ block["up"] + held)
        x = x + lax.psum(wide @ block["down"], "tensor")
        new.append(held + wide)
    return x @ params["head"], new


def mixing_step(params: Any, cache: Any, tokens: Any, positions: Any) -> tuple[Any, Any]:
    logits, cache = tensor_step(params, cache, tokens, positions)
    return logits - logits.mean(axis=0), cache
