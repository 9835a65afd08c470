"""Prompts read at once in the decode ring: tokens and caches are those of the unstaged loop."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

import layerwise_jax as lw
from layerwise_jax.batch.analysis import BatchError
from layerwise_jax.decode.sampling import Sampler
from layerwise_jax.stage.cut import CutError
from tests.models.ring import stacked

VOCABULARY, WIDTH, HEAD, LAYERS, CONTEXT, LENGTH, NEW = 31, 16, 8, 3, 20, 4, 5
PROMPT_LENGTHS = (1, 4, 7, 3, 2, 5, 4, 1, 6)


def _weights() -> Any:
    keys = iter(jax.random.split(jax.random.key(0), 100))

    def normal(rows: int, columns: int) -> jax.Array:
        return jax.random.normal(next(keys), (rows, columns)) / np.sqrt(rows)

    block = dict.fromkeys("qkvo", (WIDTH, WIDTH)) | {
        "up": (WIDTH, 2 * WIDTH),
        "down": (2 * WIDTH, WIDTH),
    }
    blocks = [{name: normal(*shape) for name, shape in block.items()} for _ in range(LAYERS)]
    return {
        "embed": 20 * normal(VOCABULARY, WIDTH),
        "blocks": blocks,
        "head": normal(WIDTH, VOCABULARY),
    }


PARAMS = _weights()
PROMPTS = [np.random.default_rng(n).integers(0, VOCABULARY, size=n) for n in PROMPT_LENGTHS]


def _cache(sequences: int) -> Any:
    leaf = jnp.zeros((sequences, CONTEXT, WIDTH))
    return [{"k": leaf, "v": leaf} for _ in range(LAYERS)]


def _attend(q: Any, cache: Any, positions: Any) -> Any:
    """Attention of q[sequences, tokens, width] at positions[sequences, tokens] to the cache up to
    there.
    """
    q, k, v = (x.reshape(*x.shape[:-1], -1, HEAD) for x in (q, cache["k"], cache["v"]))
    scores = jnp.einsum("bqhd,bthd->bhqt", q, k) / np.sqrt(HEAD)
    seen = jnp.arange(CONTEXT) <= positions[:, None, :, None]
    out = jnp.einsum("bhqt,bthd->bqhd", jax.nn.softmax(jnp.where(seen, scores, -1e9)), v)
    return out.reshape(*out.shape[:2], -1)


def _blocks(params: Any, cache: Any, x: Any, positions: Any, axis: str | None) -> tuple[Any, Any]:
    def total(x: Any) -> Any:
        return x if axis is None else jax.lax.psum(x, axis)

    new = []
    for block, held in zip(params["blocks"], cache, strict=True):
        write = jax.vmap(lambda rows, row, at: jax.lax.dynamic_update_slice(rows, row, (at, 0)))
        held = {name: write(held[name], x @ block[name], positions[:, 0]) for name in "kv"}
        new.append(held)
        x = x + total(_attend(x @ block["q"], held, positions) @ block["o"])
        x = x + total(jnp.tanh(x @ block["up"]) @ block["down"])
    return x, new


def _step(
    params: Any, cache: Any, tokens: Any, positions: Any, axis: str | None = None
) -> tuple[Any, Any]:
    x, new = _blocks(params, cache, params["embed"][tokens][:, None], positions[:, None], axis)
    return (x @ params["head"])[:, 0], new


def _last(x: Any, lengths: Any) -> Any:
    return jnp.take_along_axis(x, lengths[:, None, None] - 1, axis=1)[:, 0]


def _prefill(
    params: Any, cache: Any, tokens: Any, lengths: Any, axis: str | None = None
) -> tuple[Any, Any]:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    x, new = _blocks(params, cache, params["embed"][tokens], positions, axis)
    return _last(x @ params["head"], lengths), new


def _prefill_of_one_head(params: Any, cache: Any, tokens: Any, lengths: Any) -> tuple[Any, Any]:
    """The last token is chosen before the head, which makes the last block unlike the others."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    x, new = _blocks(params, cache, params["embed"][tokens], positions, None)
    return _last(x, lengths) @ params["head"], new


def _unstaged(
    prompt: np.ndarray, new: int = NEW, sampler: Sampler | None = None, key: Any = None
) -> np.ndarray:
    """Prefill, then decode, one sequence alone."""
    sampler, keys = sampler or Sampler(), None if key is None else jax.random.key_data(key)[None]
    length = min(len(prompt), LENGTH)
    tokens = np.zeros((1, LENGTH), np.int32)
    tokens[0, :length] = prompt[:length]
    logits, cache = jax.jit(_prefill)(PARAMS, _cache(1), tokens, jnp.asarray([length]))
    found = list(prompt[:length])
    while True:
        drawn = int(sampler(logits, keys, jnp.asarray([len(found) - 1]))[0])
        found.append(int(prompt[len(found)]) if len(found) < len(prompt) else drawn)
        if len(found) == len(prompt) + new:
            return np.asarray(found[len(prompt) :])
        logits, cache = STEP(PARAMS, cache, jnp.asarray(found[-1:]), jnp.asarray([len(found) - 1]))


STEP = jax.jit(_step)


def _ring(prefill_fn: Any = _prefill, **options: Any) -> lw.DecodeRing:
    options = {"group_size": 2, "prefill_length": LENGTH, **options}
    cache = jax.eval_shape(lambda: _cache(options["group_size"]))
    return lw.decode_ring(_step, PARAMS, cache, prefill_fn=prefill_fn, **options)


def _check_tokens(generation: Any, wanted: list[np.ndarray]) -> None:
    assert [tokens.tolist() for tokens in generation.tokens] == [
        tokens.tolist() for tokens in wanted
    ]


@pytest.fixture(scope="module")
def wanted() -> list[np.ndarray]:
    return [_unstaged(prompt) for prompt in PROMPTS]


@pytest.mark.parametrize(("stages", "groups"), [(1, 2), (2, 3), (4, 2)])
def test_tokens_are_those_of_the_unstaged_loop(
    stages: int, groups: int, wanted: list[np.ndarray]
) -> None:
    ring = _ring(num_stages=stages, num_groups=groups)
    generation = ring.generate(ring.place(PARAMS), PROMPTS, NEW, steps_per_call=4)
    _check_tokens(generation, wanted)
    assert generation.prefill_seconds > 0


def test_stages_share_their_slots_and_their_body(wanted: list[np.ndarray]) -> None:
    # The second takes the last token's row within the last block's layer, of which the body is only
    # a part.
    for prefill_fn in (_prefill, _prefill_of_one_head):
        ring = _ring(prefill_fn, partition=(0, 3, 5))
        assert ring.reader is not None
        assert ring.reader.ring.loop.has_body
        assert ring.reader.ring.loop.placement.slots is ring.ring.loop.placement.slots
    _check_tokens(ring.generate(ring.place(PARAMS), PROMPTS[:4], NEW), wanted[:4])


def test_tensor_ways(wanted: list[np.ndarray]) -> None:
    devices = np.asarray(jax.devices()[:4]).reshape(2, 2)
    mesh = Mesh(devices, ("stage", "tensor"), axis_types=(AxisType.Auto, AxisType.Auto))
    columns, rows = PartitionSpec(None, "tensor"), PartitionSpec("tensor")
    block = {**dict.fromkeys(("q", "k", "v", "up"), columns), **dict.fromkeys(("o", "down"), rows)}
    specs = {"embed": PartitionSpec(), "blocks": [block] * LAYERS, "head": PartitionSpec()}
    ring = lw.decode_ring(
        partial(_step, axis="tensor"),
        PARAMS,
        jax.eval_shape(lambda: _cache(2)),
        group_size=2,
        mesh=mesh,
        param_specs=specs,
        cache_specs=PartitionSpec(None, None, "tensor"),
        prefill_fn=partial(_prefill, axis="tensor"),
        prefill_length=LENGTH,
    )
    _check_tokens(ring.generate(ring.place(PARAMS), PROMPTS[:5], NEW), wanted[:5])


def test_a_pass_fills_caches_and_leaves_other_groups_alone() -> None:
    """Group 0 reads; group 1, which is one token on, does not."""
    ring = _ring(num_stages=2, sampler=Sampler(0.9, 5))
    staged, key = ring.place(PARAMS), jax.random.key(3)
    keys = jnp.broadcast_to(key, (2, 2))
    places = ring.start(np.asarray([[0, 0], [5, 6]]), keys=keys)
    places, _ = ring(staged, places, np.asarray([[[-1, -1], [7, 8]]]))
    places = ring.restart(
        places, [[True, True], [False, False]], np.zeros((2, 2)), np.zeros((2, 2)), keys
    )
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(ring.gather_cache(places, 1))]
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, size=(2, 2, LENGTH))
    lengths = np.asarray([[3, 4], [0, 0]])
    places, new = ring.prefill(staged, places, tokens, lengths)
    logits, cache = jax.jit(_prefill)(PARAMS, _cache(2), tokens[0], lengths[0])
    drawn = Sampler(0.9, 5)(logits, jax.random.key_data(keys[0]), jnp.asarray(lengths[0] - 1))
    assert new.tolist() == [drawn.tolist(), [7, 8]]
    for came, leaf in zip(
        jax.tree.leaves(ring.gather_cache(places, 0)), jax.tree.leaves(cache), strict=True
    ):
        for row, length in enumerate(lengths[0]):
            np.testing.assert_array_equal(came[row, :length], leaf[row, :length])
    for came, leaf in zip(jax.tree.leaves(ring.gather_cache(places, 1)), before, strict=True):
        np.testing.assert_array_equal(came, leaf)
    assert [[np.asarray(places.positions[g])[0].tolist()] for g in (0, 1)] == [[[3, 4]], [[1, 1]]]


def test_sequences_that_share_a_counter_read_whole_lengths(wanted: list[np.ndarray]) -> None:
    """The cache's counter is one number for a group, as in Flax Linen."""

    def step(params: Any, cache: Any, tokens: Any, positions: Any) -> tuple[Any, Any]:
        logits, new = _step(
            params, cache["rows"], tokens, jnp.broadcast_to(cache["next"], positions.shape)
        )
        return logits, {"rows": new, "next": cache["next"] + 1}

    def prefill(params: Any, cache: Any, tokens: Any, lengths: Any) -> tuple[Any, Any]:
        logits, new = _prefill(params, cache["rows"], tokens, lengths)
        return logits, {"rows": new, "next": cache["next"] + LENGTH}

    cache = {"rows": _cache(2), "next": jnp.int32(0)}
    ring = lw.decode_ring(
        step,
        PARAMS,
        cache,
        group_size=2,
        num_stages=1,
        num_groups=2,
        prefill_fn=prefill,
        prefill_length=LENGTH,
    )
    assert not ring.sequences_are_independent
    staged = ring.place(PARAMS)
    chosen = [1, 2, 0, 3, 5, 6]  # those of the first and the last group are long enough
    generation = ring.generate(staged, [PROMPTS[i] for i in chosen], NEW)
    _check_tokens(generation, [wanted[i] for i in chosen])
    assert generation.prefill_seconds > 0
    places = ring.start(np.zeros((2, 2)))
    with pytest.raises(ValueError, match="lengths must be 4, or 0"):
        ring.prefill(staged, places, np.zeros((2, 2, LENGTH)), [[2, 2], [0, 0]])


def test_one_new_token_takes_no_step() -> None:
    ring = _ring(num_stages=1)
    generation = ring.generate(ring.place(PARAMS), PROMPTS[3:5], 1)
    assert (generation.steps, generation.num_tokens) == (0, 2)
    _check_tokens(generation, [_unstaged(prompt, 1) for prompt in PROMPTS[3:5]])


def test_what_cannot_be_shared_is_refused() -> None:
    def fewer(params: Any, cache: Any, tokens: Any, lengths: Any) -> tuple[Any, Any]:
        logits, new = _prefill(
            {**params, "blocks": params["blocks"][1:]}, cache[1:], tokens, lengths
        )
        return logits, [cache[0], *new]

    def every_token(params: Any, cache: Any, tokens: Any, lengths: Any) -> tuple[Any, Any]:
        return params["embed"][tokens] @ params["head"], cache

    def swapped(params: Any, cache: Any, tokens: Any, lengths: Any) -> tuple[Any, Any]:
        logits, new = _prefill(params, [*cache[1:], cache[0]], tokens, lengths)
        return logits, [new[-1], *new[:-1]]

    def mixed(params: Any, cache: Any, tokens: Any, lengths: Any) -> tuple[Any, Any]:
        logits, new = _prefill(params, cache, tokens, lengths)
        return logits - logits.mean(axis=0), new

    with pytest.raises(CutError, match="prefill_fn must have the layers"):
        _ring(fewer, num_stages=2)
    with pytest.raises(
        ValueError, match=r"prefill_fn must return logits .*got float32\[2, 4, 31\]"
    ):
        _ring(every_token, num_stages=2)
    with pytest.raises(CutError, match=r"prefill_fn must use and replace .* in stage 0"):
        _ring(swapped, num_stages=2)
    with pytest.raises(BatchError):
        _ring(mixed, num_stages=2)
    with pytest.raises(ValueError, match=r"given together.*prefill_length=None"):
        _ring(num_stages=2, prefill_length=None)
    with pytest.raises(ValueError, match="got prefill_fn=None, prefill_length=4"):
        _ring(None, num_stages=2)


def test_wrong_prompts_are_refused() -> None:
    ring = _ring(num_stages=2)
    staged, places = ring.place(PARAMS), ring.start(np.zeros((2, 2)))
    prompts, lengths = np.zeros((2, 2, LENGTH)), np.full((2, 2), 2)
    with pytest.raises(ValueError, match="prompts must have shape"):
        ring.prefill(staged, places, prompts[..., 1:], lengths)
    with pytest.raises(ValueError, match="lengths must be"):
        ring.prefill(staged, places, prompts, [[0, 2], [1, 1]])
    with pytest.raises(ValueError, match="lengths must be"):
        ring.prefill(staged, places, prompts, lengths + LENGTH)
    with pytest.raises(ValueError, match="a ring with a prefill_fn"):
        _ring(None, num_stages=2, prefill_length=None).prefill(staged, places, prompts, lengths)


def _scanned_blocks(params: Any, cache: Any, x: Any, positions: Any) -> tuple[Any, Any]:
    def body(x: Any, of_layer: Any) -> tuple[Any, Any]:
        block, held = of_layer
        x, (new,) = _blocks({"blocks": [block]}, [held], x, positions, None)
        return x, new

    return jax.lax.scan(body, x, (params["blocks"], cache))


def _scanned_step(params: Any, cache: Any, tokens: Any, positions: Any) -> tuple[Any, Any]:
    x, new = _scanned_blocks(params, cache, params["embed"][tokens][:, None], positions[:, None])
    return (x @ params["head"])[:, 0], new


def _scanned_prefill(params: Any, cache: Any, tokens: Any, lengths: Any) -> tuple[Any, Any]:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    x, new = _scanned_blocks(params, cache, params["embed"][tokens], positions)
    return _last(x @ params["head"], lengths), new


def test_prompts_are_read_into_caches_that_a_scan_stacks() -> None:
    params, cache = {**PARAMS, "blocks": stacked(PARAMS["blocks"])}, stacked(_cache(2))
    options = {
        "prefill_fn": _scanned_prefill,
        "prefill_length": LENGTH,
        "group_size": 2,
        "num_stages": 2,
    }
    ring = lw.decode_ring(_scanned_step, params, cache, **options)
    generation = ring.generate(ring.place(params), PROMPTS, NEW)
    for tokens, prompt in zip(generation.tokens, PROMPTS, strict=True):
        np.testing.assert_array_equal(tokens, _unstaged(prompt))
