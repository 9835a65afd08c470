"""Requests with limits, stop sequences and keys of their own, streamed or whole."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest

from layerwise_jax.decode.generation import Request
from layerwise_jax.decode.generation.requests import checked_requests
from layerwise_jax.decode.ring import DecodeRing
from layerwise_jax.decode.sampling import Sampler
from tests.models.ring import NEW, gpt, make_ring, prompts_for, unstaged

LAYERS = 2


@pytest.fixture(scope="module")
def ring() -> DecodeRing:
    return make_ring("recurrent", LAYERS, 2, 2, stop_tokens=())


@pytest.fixture(scope="module")
def prompts(ring: DecodeRing) -> list[np.ndarray]:
    return prompts_for(ring, more=3)


@pytest.fixture(scope="module")
def wanted(prompts: list[np.ndarray]) -> list[list[int]]:
    """Every prompt by itself, unstaged, without any end but the limit."""
    return [list(map(int, x)) for x in unstaged("recurrent", LAYERS, prompts, stop_tokens=())]


def until(tokens: list[int], stop: Sequence[int]) -> list[int]:
    """Tokens up to the first place at which they end with `stop`."""
    for end in range(len(stop), len(tokens) + 1):
        if tokens[end - len(stop) : end] == list(stop):
            return tokens[:end]
    return tokens


def as_lists(tokens: Sequence[Any]) -> list[list[int]]:
    return [list(map(int, x)) for x in tokens]


def test_requests_end_at_their_own_limits_and_stop_sequences(ring, prompts, wanted) -> None:
    requests, ends = [], []
    for i, (prompt, tokens) in enumerate(zip(prompts, wanted, strict=True)):
        limit = 1 + i % NEW
        stops = [tokens[1:3]] if i % 2 else []
        requests.append(Request(prompt, max_new_tokens=limit, stop_sequences=stops))
        ends.append((until(tokens, stops[0]) if stops else tokens)[:limit])
    assert len({len(end) for end in ends}) > 2
    staged = ring.place(gpt(LAYERS))
    found = ring.generate(staged, requests, NEW, steps_per_call=3)
    assert as_lists(found.tokens) == ends
    assert found.num_tokens == sum(map(len, ends))
    # Stop sequences of the call hold for all, prompts and requests alike.
    stop = wanted[0][:2]
    found = ring.generate(staged, prompts, NEW, stop_sequences=[stop], steps_per_call=3)
    assert as_lists(found.tokens) == [until(tokens, stop) for tokens in wanted]


def test_a_stream_gives_the_same_tokens_as_they_appear(ring, prompts, wanted) -> None:
    run = ring.stream(ring.place(gpt(LAYERS)), prompts, NEW, steps_per_call=2)
    found: dict[int, list[int]] = {i: [] for i in range(len(prompts))}
    last = []
    for chunk in run:
        assert len(chunk.tokens)
        assert chunk.index not in last
        found[chunk.index] += map(int, chunk.tokens)
        last += [chunk.index] * chunk.is_last
        assert run.num_tokens >= sum(map(len, found.values()))
    assert list(found.values()) == wanted
    assert sorted(last) == list(range(len(prompts)))
    assert last[-1] >= ring.num_sequences  # those that waited end last
    assert as_lists(run.result().tokens) == wanted


def test_requests_draw_with_their_own_keys() -> None:
    ring = make_ring("recurrent", LAYERS, 2, 1, stop_tokens=(), sampler=Sampler(1.0))
    prompts, staged = prompts_for(ring, more=1), ring.place(gpt(LAYERS))
    keys = jax.random.split(jax.random.key(3), len(prompts))
    want = ring.generate(staged, prompts, 3, keys=keys).tokens
    requests = [Request(prompt, key=key) for prompt, key in zip(prompts, keys, strict=True)]
    assert as_lists(ring.generate(staged, requests, 3).tokens) == as_lists(want)
    with pytest.raises(ValueError, match="keys must be None where requests have keys"):
        ring.generate(staged, requests, 3, keys=keys)
    with pytest.raises(ValueError, match="Every request must have a key or none, got 2 of 3"):
        ring.generate(staged, [prompts[0], *requests[1:]], 3)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (Request([1], max_new_tokens=0), r"prompts\[0\]\.max_new_tokens must be .*got 0"),
        (Request([1], stop_sequences=[[]]), r"prompts\[0\]\.stop_sequences must hold .*empty"),
        (Request([1], stop_sequences=[[1.5]]), r"stop_sequences\[0\]\[0\] must be an int"),
        (Request([]), r"prompts\[0\] must be int\[length\]"),
    ],
)
def test_wrong_requests_are_refused(prompt: Request, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked_requests([prompt], 3, (), ())


def test_a_stop_sequence_ends_with_the_first_token_that_completes_it() -> None:
    (running,) = checked_requests([[7]], 9, [[1, 2], [2, 2, 3]], [5])
    running.take(np.array([1, 1, 2, 4]))
    assert running.new == [1, 1, 2]
    assert running.is_done
    (running,) = checked_requests([[1, 2]], 9, [[1, 2]], [5])
    running.take(np.array([2, 2, 5]))  # the first is the prompt's own
    assert running.new == [2, 5]
