"""The decode ring: its tokens are those of the unstaged loop, exactly."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from layerwise_jax.batch.analysis import BatchError
from layerwise_jax.decode.build import decode_ring
from layerwise_jax.decode.sampling import Sampler
from tests.models.ring import (
    NEW,
    WIDTH,
    assert_same_tokens,
    gpt,
    gpt_cache,
    gpt_step,
    make_ring,
    mixing_step,
    prompts_for,
    recurrent_step,
    tensor_step,
    unstaged,
)


@pytest.mark.parametrize(
    ("model", "layers", "num_stages", "num_groups", "group_size", "selects"),
    [
        ("gpt", 4, 1, None, 2, True),
        ("gpt", 4, 2, None, 2, True),
        ("gpt", 4, 2, None, 2, False),
        ("gpt", 4, 4, 2, 1, False),
        ("gpt", 4, 2, 3, 2, True),
        ("gpt", 5, 3, None, 1, True),
        ("gpt", 5, 3, None, 1, False),
        ("gpt", 8, 8, None, 1, True),
        ("recurrent", 4, 2, None, 2, False),
        ("recurrent", 5, 4, 5, 1, True),
        ("closed", 4, 2, None, 2, True),
        ("counting", 4, 2, None, 2, False),
    ],
)
def test_tokens_are_those_of_the_unstaged_loop(
    model: str, layers: int, num_stages: int, num_groups: int | None, group_size: int, selects: bool
) -> None:
    """More prompts than places, of different lengths; sequences end at a stop token and give their
    place away.
    """
    ring = make_ring(model, layers, num_stages, group_size, num_groups=num_groups, selects=selects)
    prompts = prompts_for(ring, more=3)
    generation = ring.generate(ring.place(gpt(layers)), prompts, NEW, steps_per_call=5)
    assert_same_tokens(generation.tokens, unstaged(model, layers, prompts))
    assert generation.num_tokens == sum(map(len, generation.tokens))
    assert generation.tokens_per_second * generation.seconds_per_token == pytest.approx(1)
    assert ring.sequences_are_independent == (model != "counting")


def test_stages_have_all_blocks_in_common_whatever_follows_the_last() -> None:
    ring = make_ring("closed", 4, 2, 2)
    assert ring.ring.loop.alignment.num_layers == 2
    assert ring.ring.selects


def test_draws_depend_on_the_sequence_alone() -> None:
    ring = make_ring("gpt", 4, 2, 2, sampler=Sampler(0.7, 5), stop_tokens=())
    prompts = prompts_for(ring, more=2)
    keys = jax.random.split(jax.random.key(5), len(prompts))
    want = unstaged("gpt", 4, prompts, Sampler(0.7, 5), keys, ())
    staged = ring.place(gpt(4))
    assert_same_tokens(ring.generate(staged, prompts, NEW, keys=keys).tokens, want)
    backwards = ring.generate(staged, prompts[::-1], NEW, keys=keys[::-1])
    assert_same_tokens(backwards.tokens[::-1], want)


def test_a_sampler_that_draws_wants_keys() -> None:
    ring = make_ring("gpt", 4, 2, 2, sampler=Sampler(0.7))
    staged = ring.place(gpt(4))
    with pytest.raises(ValueError, match="keys must be a random key a prompt"):
        ring.generate(staged, prompts_for(ring), NEW)
    with pytest.raises(ValueError, match="keys must be a random key a sequence"):
        ring.start(np.zeros((2, 2)))


@pytest.mark.parametrize("is_type", [(False, False), (True, False), (True, True)])
def test_a_place_is_given_on_with_its_first_cache(is_type: tuple[bool, bool]) -> None:
    """Of arrays, of types, which stand for zeros, and of both."""
    first = [jnp.zeros((1, WIDTH)) if each else jnp.full((1, WIDTH), 0.5) for each in is_type]
    cache = [
        jax.eval_shape(lambda x=x: x) if each else x for x, each in zip(first, is_type, strict=True)
    ]
    ring = decode_ring(recurrent_step, gpt(2), cache, group_size=1, num_stages=2)
    prompts = [np.asarray([token]) for token in (1, 2, 1, 2, 1)]
    tokens = ring.generate(ring.place(gpt(2)), prompts, NEW).tokens
    assert_same_tokens(tokens[2:], [tokens[0], tokens[1], tokens[0]])
    held, token, wanted = first, jnp.asarray([1]), []
    for position in range(NEW):
        logits, held = recurrent_step(gpt(2), held, token, jnp.asarray([position]))
        token = jnp.argmax(logits, axis=-1)
        wanted.append(int(token[0]))
    assert list(tokens[0]) == wanted


def columns_step(params: Any, cache: Any, tokens: Any, positions: Any) -> tuple[Any, Any]:
    """Two states a layer, in one array [2, sequences, width]."""
    x, new = params["embed"][tokens], []
    for block, held in zip(params["blocks"], cache, strict=True):
        x = x + jnp.tanh(held.sum(axis=0) @ block["out"] + x)
        new.append(0.5 * held + x)
    return x @ params["head"], new


def test_sequences_that_are_not_rows_of_the_cache_end_together() -> None:
    """As many sequences as states: by its shape alone the first axis could be theirs."""
    cache = [jnp.zeros((2, 2, WIDTH))] * 4
    ring = decode_ring(columns_step, gpt(4), cache, group_size=2, num_stages=1)
    assert not ring.sequences_are_independent
    staged, prompts = ring.place(gpt(4)), [np.asarray([token]) for token in (1, 2, 3, 4, 5)]
    (alone,) = ring.generate(staged, prompts[3:4], NEW).tokens
    assert_same_tokens(ring.generate(staged, prompts, NEW).tokens[3:4], [alone])
    places, none = ring.start(np.zeros((1, 2))), np.zeros((1, 2), np.int32)
    with pytest.raises(ValueError, match="mask must have whole groups"):
        ring.restart(places, [[True, False]], none, none)
    with pytest.raises(BatchError, match="In the cache, sequences are the first axis, of length 2"):
        decode_ring(columns_step, gpt(4), cache, group_size=2, num_stages=2)


def test_stages_are_given_once_and_at_least_one() -> None:
    with pytest.raises(ValueError, match=r"num_stages must be .*got 0"):
        make_ring("gpt", 4, 0, 1)
    with pytest.raises(ValueError, match="num_stages must be the partition's 2 stages, got 1"):
        make_ring("gpt", 4, 1, 1, partition=(0, 2, 4))


def test_calls_go_on_where_the_last_one_stopped_and_caches_come_back() -> None:
    ring = make_ring("gpt", 4, 2, 2, abstract=False, stop_tokens=())
    staged, first = ring.place(gpt(4)), np.asarray([[1, 2], [3, 4]])
    places, together = ring(staged, ring.start(first), np.full((6, 2, 2), -1))
    cache = ring.gather_cache(places, 1)
    places, a = ring(staged, ring.start(first), np.full((2, 2, 2), -1))
    places, b = ring(staged, places, np.full((4, 2, 2), -1))
    np.testing.assert_array_equal(np.concatenate([a, b]), together)

    held, tokens = gpt_cache(4, 2), jnp.asarray(first[1])
    for position in range(6):
        logits, held = jax.jit(gpt_step)(gpt(4), held, tokens, jnp.full(2, position))
        tokens = jnp.argmax(logits, axis=-1)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), cache, held)
    again, _ = ring(
        staged,
        ring.start(tokens[None].repeat(2, 0), 6, caches=[held, held]),
        np.full((1, 2, 2), -1),
    )
    assert np.asarray(again.positions[0]).min() == 7


@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_tensor_ways_inside_a_stage(num_stages: int, stage_mesh: Callable[..., Mesh]) -> None:
    split = {"qkv": PartitionSpec(), "out": PartitionSpec(), "up": PartitionSpec(None, "tensor")}
    blocks = [{**split, "down": PartitionSpec("tensor")}] * 4
    specs = {"embed": PartitionSpec(), "blocks": blocks, "head": PartitionSpec()}
    cache = [jax.ShapeDtypeStruct((1, 2 * WIDTH), jnp.float32)] * 4
    options = {"group_size": 1, "param_specs": specs, "cache_specs": PartitionSpec(None, "tensor")}
    ring = decode_ring(tensor_step, gpt(4), cache, mesh=stage_mesh(num_stages, tensor=2), **options)
    alone = decode_ring(
        tensor_step, gpt(4), cache, mesh=stage_mesh(1, tensor=1), num_groups=num_stages, **options
    )
    prompts = prompts_for(ring)
    got, want = (each.generate(each.place(gpt(4)), prompts, NEW).tokens for each in (ring, alone))
    assert_same_tokens(got, want)
    assert ring.sequences_are_independent
    with pytest.raises(BatchError, match="uses a sum or mean over the examples"):
        decode_ring(
            mixing_step,
            gpt(4),
            cache,
            mesh=stage_mesh(num_stages, tensor=2),
            num_groups=4,
            **options,
        )
    uneven = [jax.ShapeDtypeStruct((1, 2 * WIDTH + 1), jnp.float32)] * 4
    with pytest.raises(ValueError, match="does not split 2 ways"):
        decode_ring(tensor_step, gpt(4), uneven, mesh=stage_mesh(num_stages, tensor=2), **options)


def test_a_second_generation_compiles_nothing(caplog: pytest.LogCaptureFixture) -> None:
    ring = make_ring("gpt", 4, 2, 2)
    placed, prompts = ring.place(gpt(4)), prompts_for(ring)
    first = ring.generate(placed, prompts, 3, steps_per_call=3)
    with jax.log_compiles():
        second = ring.generate(placed, prompts, 3, steps_per_call=3)
    assert [r.message for r in caplog.records if r.message.startswith("Compiling")] == []
    assert_same_tokens(second.tokens, first.tokens)
