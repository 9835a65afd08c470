"""Caches with a counter a sequence of which the step reads one: Flax's `end_index`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from layerwise_jax.batch.analysis import BatchError
from layerwise_jax.decode.build import decode_ring
from layerwise_jax.decode.lockstep import find_cache_form
from tests.models.ring import WIDTH, draw

LAYERS, GROUP, CONTEXT, VOCABULARY, NEW = 2, 2, 12, 32, 4
PARAMS = {"embed": 3 * draw(VOCABULARY, WIDTH), "layers": [draw(WIDTH, WIDTH)] * LAYERS}

READS = {
    "first": lambda index: index[0],
    "last": lambda index: index[-1],
    "largest": lambda index: index.max(),
}


def step_reading(read: Any, advance: Any = lambda index, tokens: index + 1) -> Any:
    """Keys are written at one sequence's index, which `read` takes of all."""

    def step(params: Any, cache: Any, tokens: Any, positions: Any) -> tuple[Any, Any]:
        y, new = params["embed"][tokens], []
        for weight, held in zip(params["layers"], cache, strict=True):
            at = (0, read(held["end_index"]), 0)
            keys = lax.dynamic_update_slice(held["k"], y[:, None], at)
            y = y + jnp.tanh(keys.sum(1) @ weight)
            new.append({"k": keys, "end_index": advance(held["end_index"], tokens)})
        return y @ params["embed"].T, new

    return step


def by_sequence(params: Any, cache: Any, tokens: Any, positions: Any) -> tuple[Any, Any]:
    """Every sequence reads its own index."""
    y, new = params["embed"][tokens], []
    for weight, held in zip(params["layers"], cache, strict=True):
        write = jax.vmap(lambda k, row, at: lax.dynamic_update_slice(k, row[None], (at, 0)))
        keys = write(held["k"], y, held["end_index"])
        y = y + jnp.tanh(keys.sum(1) @ weight)
        new.append({"k": keys, "end_index": held["end_index"] + 1})
    return y @ params["embed"].T, new


def make_cache(end_index: Any = (0,) * GROUP) -> list[Any]:
    keys = jnp.zeros((GROUP, CONTEXT, WIDTH))
    return [{"k": keys, "end_index": jnp.asarray(end_index, jnp.int32)} for _ in range(LAYERS)]


def unstaged(step: Any, group: list[int]) -> list[list[int]]:
    """A group by itself."""
    cache, tokens, rows = make_cache(), jnp.asarray(group), []
    for i in range(NEW):
        logits, cache = step(PARAMS, cache, tokens, jnp.full((GROUP,), i))
        tokens = logits.argmax(-1)
        rows.append(tokens)
    return np.stack(rows, 1).tolist()


def form_of(step: Any, cache: Any) -> Any:
    types = jax.eval_shape(lambda: (PARAMS, cache))
    return find_cache_form(step, *types, GROUP, {}, cache)


def test_a_groups_tokens_are_those_of_the_group_unstaged() -> None:
    step = step_reading(READS["first"])
    ring = decode_ring(step, PARAMS, make_cache(), group_size=GROUP, num_stages=2)
    assert not ring.sequences_are_independent
    # Five prompts for two groups of two: the last has a group to itself, once one has ended.
    prompts = [[token] for token in range(1, 6)]
    staged = ring.place(PARAMS)
    found = [list(map(int, x)) for x in ring.generate(staged, prompts, NEW).tokens]
    assert found[:4] == [*unstaged(step, [1, 2]), *unstaged(step, [3, 4])]
    assert found[4] == unstaged(step, [5, 0])[0]
    held = ring.gather_cache(ring.start(np.ones((2, GROUP), np.int32)), 1)
    jax.tree.map(np.testing.assert_array_equal, held, make_cache())


@pytest.mark.parametrize("name", READS)
def test_counters_that_one_sequence_is_read_of_are_shared(name: str) -> None:
    form = form_of(step_reading(READS[name]), make_cache((3,) * GROUP))
    assert [form.lockstep.names[i] for i in sorted(form.lockstep.leaves)] == [
        "[0]['end_index']",
        "[1]['end_index']",
    ]
    split = form.split(make_cache((3,) * GROUP))
    assert [int(held["end_index"]) for held in split] == [3, 3]
    jax.tree.map(np.testing.assert_array_equal, form.join(split), make_cache((3,) * GROUP))


def test_counters_that_each_sequence_reads_stay_its_own() -> None:
    assert not form_of(by_sequence, make_cache()).lockstep.leaves
    ring = decode_ring(by_sequence, PARAMS, make_cache(), group_size=GROUP, num_stages=2)
    assert ring.sequences_are_independent


@pytest.mark.parametrize(
    ("advance", "start"),
    [
        (lambda index, tokens: index + 1, (0, 1)),  # not equal at first
        (lambda index, tokens: index + (tokens > 3), (0, 0)),  # nor afterwards
        (lambda index, tokens: index.at[0].add(1), (0, 0)),
    ],
)
def test_counters_that_differ_are_refused(advance: Any, start: Any) -> None:
    step = step_reading(READS["first"], advance)
    with pytest.raises(BatchError, match="takes some of the examples by their place"):
        decode_ring(step, PARAMS, make_cache(start), group_size=GROUP, num_stages=2)


def test_caches_and_specs_that_do_not_fit_a_shared_counter_are_refused() -> None:
    form = form_of(step_reading(READS["first"]), make_cache())
    with pytest.raises(ValueError, match=r"at \[0\]\['end_index'\], got \[1, 2\]"):
        form.split(make_cache((1, 2)))
    with pytest.raises(ValueError, match=r"cache_specs must not shard \[0\]\['end_index'\]"):
        form.specs(PartitionSpec("tensor"))
    assert form.specs(PartitionSpec())[0]["end_index"] == PartitionSpec()
    assert form.specs(None) is None


def test_a_prefill_that_advances_sequences_differently_is_refused() -> None:
    def reading(params: Any, cache: Any, tokens: Any, lengths: Any) -> tuple[Any, Any]:
        step = step_reading(READS["first"], lambda index, _: index + lengths)
        return step(params, cache, tokens[:, -1], lengths)

    form = form_of(step_reading(READS["first"]), make_cache())
    split = form.split(make_cache())
    types = jax.eval_shape(lambda: (PARAMS, split))
    tokens, lengths = jnp.zeros((GROUP, 3), jnp.int32), jnp.zeros((GROUP,), jnp.int32)
    with pytest.raises(ValueError, match=r"prefill_fn must keep cache\[0\]\['end_index'\] equal"):
        jax.eval_shape(form.step(reading), *types, tokens, lengths)
