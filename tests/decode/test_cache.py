"""Caches as people keep them: stacked over layers, beside memories that no token changes, of any
first value.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from layerwise_jax.batch.analysis import BatchError
from layerwise_jax.decode.build import decode_ring
from tests.models.ring import stacked

VOCABULARY, WIDTH, LAYERS, WORDS, NEW = 31, 8, 4, 3, 5

Step = Callable[[Any, Any, Any, Any], tuple[Any, Any]]


def draw(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


PARAMS = {
    "embed": draw(0, VOCABULARY, WIDTH),
    "layers": draw(1, LAYERS, WIDTH, WIDTH) / np.sqrt(WIDTH),
}


def layer(
    weight: jax.Array, x: jax.Array, state: jax.Array, memory: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A state that every token changes, and a memory that is read by attention."""
    state = jnp.tanh(state @ weight + x)
    seen = jax.nn.softmax(jnp.einsum("bd,bwd->bw", state, memory))
    return x + state + jnp.einsum("bw,bwd->bd", seen, memory), state


def listed_step(params: Any, cache: Any, tokens: Any, positions: Any) -> tuple[Any, Any]:
    """A leaf a layer; every layer has a memory of its own."""
    x, new = params["embed"][tokens], []
    for weight, held in zip(params["layers"], cache, strict=True):
        x, state = layer(weight, x, held["state"], held["memory"])
        new.append({"state": state, "memory": held["memory"]})
    return x @ params["embed"].T, new


def shared_step(params: Any, cache: Any, tokens: Any, positions: Any) -> tuple[Any, Any]:
    """One memory for all layers, as an encoder's output; states in rows, stacked again at the
    end.
    """
    x, new = params["embed"][tokens], []
    for i, weight in enumerate(params["layers"]):
        x, state = layer(weight, x, cache["state"][i], cache["memory"])
        new.append(state)
    return x @ params["embed"].T, {"state": jnp.stack(new), "memory": cache["memory"]}


def scanned_step(params: Any, cache: Any, tokens: Any, positions: Any) -> tuple[Any, Any]:
    """A scan over layers, which stacks states and memories."""

    def body(x: Any, of_layer: Any) -> tuple[Any, Any]:
        weight, held = of_layer
        x, state = layer(weight, x, held["state"], held["memory"])
        return x, {"state": state, "memory": held["memory"]}

    x, new = lax.scan(body, params["embed"][tokens], (params["layers"], cache))
    return x @ params["embed"].T, new


def rounded_step(params: Any, cache: Any, tokens: Any, positions: Any) -> tuple[Any, Any]:
    """States of 8 bits, all of them read at the start and rounded at the end."""
    wide = [
        {"state": held["state"].astype(jnp.float32) / 64, "memory": held["memory"]}
        for held in cache
    ]
    logits, new = listed_step(params, wide, tokens, positions)
    return logits, [
        {**held, "state": jnp.round(64 * held["state"]).astype(jnp.int8)} for held in new
    ]


def filled_step(params: Any, cache: Any, tokens: Any, positions: Any) -> tuple[Any, Any]:
    """One array for all layers, changed in place."""
    x = params["embed"][tokens]
    for i, weight in enumerate(params["layers"]):
        x, state = layer(weight, x, cache["state"][i], cache["memory"])
        cache = {**cache, "state": cache["state"].at[i].set(state)}
    return x @ params["embed"].T, cache


def listed_cache(sequences: int, seed: int = 2) -> list[Any]:
    """Sequences that begin alike, with nothing that is zero."""
    rows = draw(seed, LAYERS, 1, 1 + WORDS, WIDTH)
    held = jnp.broadcast_to(rows, (LAYERS, sequences, 1 + WORDS, WIDTH))
    return [{"state": of_layer[:, 0], "memory": of_layer[:, 1:]} for of_layer in held]


def scanned_cache(sequences: int, seed: int = 2) -> Any:
    return stacked(listed_cache(sequences, seed))


def shared_cache(sequences: int, seed: int = 2) -> Any:
    return {**scanned_cache(sequences, seed), "memory": listed_cache(sequences, seed)[0]["memory"]}


def rounded_cache(sequences: int, seed: int = 2) -> list[Any]:
    held = listed_cache(sequences, seed)
    return [{**each, "state": jnp.round(16 * each["state"]).astype(jnp.int8)} for each in held]


FORMS: dict[str, tuple[Step, Callable[..., Any]]] = {
    "listed": (listed_step, listed_cache),
    "shared": (shared_step, shared_cache),
    "scanned": (scanned_step, scanned_cache),
    "rounded": (rounded_step, rounded_cache),
}


def unstaged(form: str, prompt: np.ndarray, seed: int = 2) -> list[int]:
    step, make_cache = FORMS[form]
    run, cache, tokens = jax.jit(step), make_cache(1, seed), list(prompt)
    for position in range(len(prompt) + NEW - 1):
        logits, cache = run(PARAMS, cache, jnp.asarray([tokens[position]]), jnp.asarray([position]))
        if position + 1 >= len(prompt):
            tokens.append(int(logits[0].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("num_stages", "num_groups"), [(3, None), (4, 1), (2, 3)])
def test_tokens_are_those_of_the_unstaged_loop(
    form: str, num_stages: int, num_groups: int | None
) -> None:
    """More prompts than places, so that a place that is given on begins with the first cache
    again.
    """
    step, make_cache = FORMS[form]
    ring = decode_ring(
        step, PARAMS, make_cache(2), group_size=2, num_stages=num_stages, num_groups=num_groups
    )
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, VOCABULARY, size=1 + i % 3) for i in range(ring.num_sequences + 3)]
    generation = ring.generate(ring.place(PARAMS), prompts, NEW, steps_per_call=3)
    assert [tokens.tolist() for tokens in generation.tokens] == [
        unstaged(form, prompt) for prompt in prompts
    ]


@pytest.mark.parametrize("form", FORMS)
def test_groups_have_caches_of_their_own(form: str) -> None:
    step, make_cache = FORMS[form]
    ring = decode_ring(step, PARAMS, make_cache(2), group_size=2, num_stages=2)
    caches = [make_cache(2, seed) for seed in range(ring.num_groups)]
    first = np.arange(ring.num_sequences, dtype=np.int32).reshape(ring.num_groups, 2)
    places = ring.start(first, caches=caches)
    jax.tree.map(
        np.testing.assert_array_equal,
        [ring.gather_cache(places, g) for g in range(ring.num_groups)],
        caches,
    )
    _, found = ring(ring.place(PARAMS), places, np.full((NEW, ring.num_groups, 2), -1, np.int32))
    want = [
        [unstaged(form, np.asarray([token]), seed) for token in group]
        for seed, group in enumerate(first)
    ]
    assert np.moveaxis(found, 0, -1).tolist() == want


def test_caches_of_other_sizes_are_refused() -> None:
    ring = decode_ring(shared_step, PARAMS, shared_cache(2), group_size=2, num_stages=2)
    more = jax.tree.map(lambda x: jnp.concatenate([x, x]), shared_cache(2))
    first = np.zeros((ring.num_groups, 2), np.int32)
    for other, said in (
        (more, "stacked over 4 layers"),
        (shared_cache(1), r"got float32\[1, 3, 8\]"),
    ):
        with pytest.raises(ValueError, match=said):
            ring.start(first, caches=[other] * ring.num_groups)


def test_an_array_of_all_layers_that_is_changed_in_place_is_refused() -> None:
    with pytest.raises(BatchError, match=r"stacked over layers they are the second.*\(cache\[i\]"):
        decode_ring(filled_step, PARAMS, shared_cache(2), group_size=2, num_stages=2)


def split_step(
    params: Any, cache: jax.Array, tokens: Any, positions: Any
) -> tuple[jax.Array, jax.Array]:
    """Every layer's state is split over `tensor` within its rows."""
    x, new = params["embed"][tokens], []
    for weight, held in zip(params["layers"], cache, strict=False):
        state = jnp.tanh(held + x @ weight)
        x = x + lax.psum(state @ weight.T, "tensor")
        new.append(state)
    return x @ params["embed"].T, jnp.stack(new)


def test_rows_of_a_stack_are_sharded_and_its_layers_are_not(
    stage_mesh: Callable[..., Mesh],
) -> None:
    kernel = PartitionSpec(None, None, "tensor")
    specs = {"embed": PartitionSpec(), "layers": kernel}
    cache, options = (
        draw(4, LAYERS, 2, WIDTH),
        {"group_size": 2, "param_specs": specs, "num_groups": 2},
    )
    found = []
    for mesh in (stage_mesh(2, tensor=2), stage_mesh(1, tensor=1)):
        ring = decode_ring(split_step, PARAMS, cache, mesh=mesh, cache_specs=kernel, **options)
        prompts = [np.asarray([token]) for token in range(2 * ring.num_sequences)]
        found.append(
            [tokens.tolist() for tokens in ring.generate(ring.place(PARAMS), prompts, NEW).tokens]
        )
    assert found[0] == found[1]
    half, mesh = cache[..., : WIDTH // 2], stage_mesh(2, tensor=2)
    with pytest.raises(ValueError, match="must not shard the axis of layers"):
        decode_ring(
            split_step, PARAMS, half, mesh=mesh, cache_specs=PartitionSpec("tensor"), **options
        )
