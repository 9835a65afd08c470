"""The decode ring: its tokens are those of the unstaged loop, exactly, and its compiled loop moves no cache."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo_text import loop_bodies, read_module
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from layerwise_jax.aot import absent_mesh, can_compile_for_absent_gpus
from layerwise_jax.batching import BatchError
from layerwise_jax.decode import decode_ring
from layerwise_jax.devices import H100
from layerwise_jax.ring import DecodeRing
from layerwise_jax.ring_loop import Places
from layerwise_jax.sampling import Sampler
from layerwise_jax.stages import CutError

VOCABULARY, WIDTH, CONTEXT, NEW = 31, 16, 24, 6
STOP = 3

Step = Callable[[Any, Any, Any, Any], tuple[Any, Any]]


def draw(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape) / np.sqrt(shape[0]), jnp.float32)


def gpt(layers: int) -> dict[str, Any]:
    blocks = [{name: (i + 1.0) ** 0.1 * draw(*shape) for name, shape in SHAPES.items()} for i in range(layers)]
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
    lengths = [3 if same_length else int(rng.integers(1, 5)) for _ in range(ring.num_sequences + more)]
    return [rng.integers(0, VOCABULARY, size=length) for length in lengths]


def assert_same_tokens(got: Sequence[np.ndarray], want: Sequence[np.ndarray]) -> None:
    assert [list(tokens) for tokens in got] == [list(tokens) for tokens in want]


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
    """More prompts than places, of different lengths; sequences end at a stop token and give their place away."""
    ring = make_ring(model, layers, num_stages, group_size, num_groups=num_groups, selects=selects)
    prompts = prompts_for(ring, more=3)
    generation = ring.generate(ring.place(gpt(layers)), prompts, NEW, steps_per_call=5)
    assert_same_tokens(generation.tokens, unstaged(model, layers, prompts))
    assert generation.num_tokens == sum(map(len, generation.tokens))
    assert generation.tokens_per_second * generation.seconds_per_token == pytest.approx(1)
    assert ring.keeps_rows == (model != "counting")


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
    with pytest.raises(ValueError, match="a random key a prompt, is wanted"):
        ring.generate(staged, prompts_for(ring), NEW)
    with pytest.raises(ValueError, match="a random key a sequence is wanted"):
        ring.start(np.zeros((2, 2)))


@pytest.mark.parametrize("is_type", [(False, False), (True, False), (True, True)])
def test_a_place_is_given_on_with_its_first_cache(is_type: tuple[bool, bool]) -> None:
    """Of arrays, of types, which stand for zeros, and of both."""
    first = [jnp.zeros((1, WIDTH)) if each else jnp.full((1, WIDTH), 0.5) for each in is_type]
    cache = [jax.eval_shape(lambda x=x: x) if each else x for x, each in zip(first, is_type, strict=True)]
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
    assert not ring.keeps_rows
    staged, prompts = ring.place(gpt(4)), [np.asarray([token]) for token in (1, 2, 3, 4, 5)]
    (alone,) = ring.generate(staged, prompts[3:4], NEW).tokens
    assert_same_tokens(ring.generate(staged, prompts, NEW).tokens[3:4], [alone])
    places, none = ring.start(np.zeros((1, 2))), np.zeros((1, 2), np.int32)
    with pytest.raises(ValueError, match="all or none start anew"):
        ring.restart(places, [[True, False]], none, none)
    with pytest.raises(BatchError, match="has 2 of them on its first axis"):
        decode_ring(columns_step, gpt(4), cache, group_size=2, num_stages=2)


def test_stages_are_given_once_and_at_least_one() -> None:
    with pytest.raises(ValueError, match="num_stages is 0"):
        make_ring("gpt", 4, 0, 1)
    with pytest.raises(ValueError, match="num_stages is 1 and the partition has 2 stages"):
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
    again, _ = ring(staged, ring.start(tokens[None].repeat(2, 0), 6, caches=[held, held]), np.full((1, 2, 2), -1))
    assert np.asarray(again.positions[0]).min() == 7


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


@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_tensor_ways_inside_a_stage(num_stages: int, stage_mesh: Callable[..., Mesh]) -> None:
    split = {"qkv": PartitionSpec(), "out": PartitionSpec(), "up": PartitionSpec(None, "tensor")}
    blocks = [{**split, "down": PartitionSpec("tensor")}] * 4
    specs = {"embed": PartitionSpec(), "blocks": blocks, "head": PartitionSpec()}
    cache = [jax.ShapeDtypeStruct((1, 2 * WIDTH), jnp.float32)] * 4
    options = {"group_size": 1, "param_specs": specs, "cache_specs": PartitionSpec(None, "tensor")}
    ring = decode_ring(tensor_step, gpt(4), cache, mesh=stage_mesh(num_stages, tensor=2), **options)
    alone = decode_ring(tensor_step, gpt(4), cache, mesh=stage_mesh(1, tensor=1), num_groups=num_stages, **options)
    prompts = prompts_for(ring)
    got, want = (each.generate(each.place(gpt(4)), prompts, NEW).tokens for each in (ring, alone))
    assert_same_tokens(got, want)
    assert ring.keeps_rows
    with pytest.raises(BatchError, match="uses a sum or mean over the examples"):
        decode_ring(mixing_step, gpt(4), cache, mesh=stage_mesh(num_stages, tensor=2), num_groups=4, **options)
    uneven = [jax.ShapeDtypeStruct((1, 2 * WIDTH + 1), jnp.float32)] * 4
    with pytest.raises(ValueError, match="does not split 2 ways"):
        decode_ring(tensor_step, gpt(4), uneven, mesh=stage_mesh(num_stages, tensor=2), **options)


def places_of(ring: DecodeRing, mesh: Mesh) -> Places:
    """The types of what `start` returns."""
    sharding, stages, length = NamedSharding(mesh, PartitionSpec("stage")), mesh.shape["stage"], ring.ring.length

    def typed(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((stages, *shape), dtype, sharding=sharding)

    slots = ring.ring.loop.placement.slots
    caches = {j: typed(*slots[j].aval.shape, dtype=slots[j].aval.dtype) for j in ring.ring.loop.state_slots}
    rows: list[Any] = [typed(ring.group_size)] * length
    keys: list[Any] = [typed(ring.group_size, 2, dtype=jnp.uint32)] * length
    return Places([caches] * length, rows, rows, keys, [typed(ring.group_size, dtype=jnp.bool_)] * length)


def steady_round(mesh: Mesh, step: Step = gpt_step, **options: Any) -> Any:
    """(the instructions of a steady round, the compiled program, bytes of all caches)."""
    types, cache = jax.eval_shape(lambda: (gpt(4), gpt_cache(4, 3)))
    if step is scanned_gpt_step:
        types, cache = jax.eval_shape(
            lambda: ({**gpt(4), "blocks": stacked(gpt(4)["blocks"])}, stacked(gpt_cache(4, 3)))
        )
    ring = decode_ring(step, types, cache, group_size=3, mesh=mesh, **options)
    places = places_of(ring, mesh)
    compiled = ring.compiled(ring.place(types), places, 9)
    bodies = loop_bodies(read_module(compiled.as_text()))
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(places.caches)) // mesh.size
    return max(bodies, key=len), compiled, held


MESHES = [
    "cpu",
    pytest.param(
        "h100", marks=pytest.mark.skipif(not can_compile_for_absent_gpus(), reason="no compiler for absent GPUs")
    ),
]


@pytest.mark.parametrize("step", [gpt_step, scanned_gpt_step])
@pytest.mark.parametrize("target", MESHES)
def test_a_round_moves_no_cache_and_has_one_message_a_tick(
    target: str, step: Step, stage_mesh: Callable[..., Mesh]
) -> None:
    mesh = stage_mesh(2) if target == "cpu" else absent_mesh(H100, {"stage": 2})
    body, compiled, cache_bytes = steady_round(mesh, step)
    opcodes = [instruction.opcode.removesuffix("-start") for instruction in body]
    assert opcodes.count("collective-permute") == 2  # a round of two stages has two ticks
    assert "conditional" not in opcodes
    assert "while" not in opcodes
    moves = ("copy", "copy-start", "dynamic-slice", "slice")
    sizes = [instruction.num_elements or 0 for instruction in body if instruction.opcode in moves]
    assert max(sizes, default=0) < WIDTH * WIDTH  # the least of a weight and of a cache
    stats = compiled.memory_analysis()
    assert stats.alias_size_in_bytes >= cache_bytes


def test_a_branch_is_seen_where_there_is_one(stage_mesh: Callable[..., Mesh]) -> None:
    """The control of the test above: embedding and head under conditions."""
    body, _, _ = steady_round(stage_mesh(2), selects=False)
    assert any(instruction.opcode == "while" for instruction in body)


def test_what_cannot_be_a_ring_is_refused(stage_mesh: Callable[..., Mesh]) -> None:
    params, cache = gpt(4), jax.eval_shape(lambda: gpt_cache(4, 2))

    def mixing(params: Any, cache: Any, tokens: Any, positions: Any) -> tuple[Any, Any]:
        logits, cache = gpt_step(params, cache, tokens, positions)
        return logits - logits.mean(axis=0), cache

    def rereading(params: Any, cache: Any, tokens: Any, positions: Any) -> tuple[Any, Any]:
        logits, cache = gpt_step(params, cache, tokens, positions)
        return logits + (params["head"].T @ params["head"])[tokens], cache

    def make(step: Step, cache: Any = cache, **options: Any) -> DecodeRing:
        return decode_ring(step, params, cache, **{"group_size": 2, "num_stages": 2, **options})

    with pytest.raises(BatchError, match="in 2 groups"):
        make(mixing)
    with pytest.raises(CutError, match="reads the tokens"):
        make(rereading)
    with pytest.raises(ValueError, match="one row a sequence"):
        make(lambda p, c, t, x: (gpt_step(p, c, t, x)[0][:, None], c))
    with pytest.raises(ValueError, match="another cache than it got"):
        make(lambda p, c, t, x: (gpt_step(p, c, t, x)[0], c[:-1]))
    with pytest.raises(ValueError, match="group_size is 0"):
        make(gpt_step, group_size=0)
    for name, wrong in {"num_groups": 2.5, "num_stages": 3.0, "pad_token": "x", "stop_tokens": 3}.items():
        with pytest.raises(ValueError, match=f"{name} is {wrong!r}"):
            make(gpt_step, **{name: wrong})
    with pytest.raises(ValueError, match=r"sampler is 'greedy'.*lw\.Sampler"):
        make(gpt_step, sampler="greedy")
    with pytest.raises(ValueError, match="a ring for each replica"):
        make(gpt_step, mesh=stage_mesh(2, data=2))
    with pytest.raises(ValueError, match="temperature is -1"):
        Sampler(-1)
    with pytest.raises(ValueError, match="temperature is 'hot'"):
        Sampler("hot")
    with pytest.raises(ValueError, match="top_k is 0"):
        Sampler(1.0, 0)


def test_wrong_arguments_are_refused() -> None:
    ring = make_ring("gpt", 4, 2, 2)
    staged = ring.place(gpt(4))
    with pytest.raises(ValueError, match="another tree"):
        ring.place({"embed": draw(VOCABULARY, WIDTH)})
    with pytest.raises(ValueError, match=r"tokens came as \[1, 2\]; \[2, 2\] is wanted"):
        ring.start(np.zeros((1, 2)))
    with pytest.raises(ValueError, match="2 groups; one each"):
        ring.start(np.zeros((2, 2)), caches=[gpt_cache(4, 2)])
    with pytest.raises(ValueError, match="placed parameters"):
        ring.generate({}, [np.asarray([1])], 1)
    with pytest.raises(ValueError, match="No prompt came"):
        ring.generate(staged, [], 1)
    with pytest.raises(ValueError, match=r"max_new_tokens is 1\.5"):
        ring.generate(staged, [[1]], 1.5)
    with pytest.raises(ValueError, match="steps_per_call is 0"):
        ring.generate(staged, [[1]], 1, steps_per_call=0)
    with pytest.raises(ValueError, match=r"Prompt 1 came as int32\[0\]"):
        ring.generate(staged, [np.asarray([1]), np.asarray([], np.int32)], 1)
    with pytest.raises(ValueError, match=r"Prompt 0 came as float64\[1\]"):
        ring.generate(staged, [[1.5]], 1)
    with pytest.raises(
        ValueError, match="Prompt 0 has tokens from -1 to 2"
    ):  # -1 stands for none among those of a ring
        ring.generate(staged, [[1, -1, 2]], 1)
    with pytest.raises(ValueError, match=r"forced came as \[3, 1, 2\]"):
        ring(staged, ring.start(np.zeros((2, 2))), np.full((3, 1, 2), -1))
    with pytest.raises(ValueError, match=r"shape \[1, 2\]; \[2, 2\] is wanted"):
        ring.generate(staged, [np.asarray([1])] * 2, 1, keys=jax.random.split(jax.random.key(0), 1))
    with pytest.raises(ValueError, match=r"shape \[1, 4\]; \[1, 2\] is wanted.*default implementation"):
        ring.generate(staged, [np.asarray([1])], 1, keys=jax.random.split(jax.random.key(0, impl="rbg"), 1))
    with pytest.raises(ValueError, match="keys came as list"):
        ring.generate(staged, [np.asarray([1])], 1, keys=[0])
