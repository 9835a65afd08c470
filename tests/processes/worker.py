"""One of several processes: runs every check below and prints what it found as a line of JSON.

python -m tests.processes.worker PROCESS PROCESSES PORT DIRECTORY DEVICES
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import layerwise_jax as lw

WIDTH, DEPTH, BATCH = 16, 8, 16
CHECKPOINTS = int(os.environ.get("CHECKPOINTS", 3))
CHECKS: dict[str, Callable[..., Any]] = {}


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    CHECKS[function.__name__] = function
    return function


def loss_fn(params: Any, x: Any, y: Any) -> Any:
    for weight, bias in params:
        x = jnp.tanh(x @ weight + bias)
    return jnp.mean((x - y) ** 2)


def decode(params: Any, cache: Any, tokens: Any, positions: Any) -> tuple[Any, Any]:
    x, kept = params["embed"][tokens], []
    for weight, state in zip(params["layers"], cache, strict=True):
        state = 0.9 * state + x
        x = x + jnp.tanh(state @ weight)
        kept.append(state)
    return x @ params["embed"].T, kept


def prefill(params: Any, cache: Any, tokens: Any, lengths: Any) -> tuple[Any, Any]:
    """The step over int32[sequences, length] tokens at once: states are decayed sums."""
    x, kept = params["embed"][tokens], []  # [sequences, length, width]
    at = jnp.arange(tokens.shape[1])
    last = (lengths - 1)[:, None, None]  # [sequences, 1, 1]
    ago = at[:, None] - at
    decay = jnp.where(ago >= 0, 0.9 ** jnp.maximum(ago, 0), 0.0)  # [length, length]
    for weight, state in zip(params["layers"], cache, strict=True):
        states = jnp.einsum("tu,nud->ntd", decay, x)
        states = states + 0.9 ** (at + 1.0)[:, None] * state[:, None]
        x = x + jnp.tanh(states @ weight)
        kept.append(jnp.take_along_axis(states, last, axis=1)[:, 0])
    return jnp.take_along_axis(x, last, axis=1)[:, 0] @ params["embed"].T, kept


def data() -> tuple[Any, Any, Any]:
    """(parameters, inputs, targets), equal in all processes."""
    draw = np.random.default_rng(0)
    shape = (WIDTH, WIDTH)
    params = [(draw.normal(size=shape).astype("f") / 4, np.zeros(WIDTH, "f")) for _ in range(DEPTH)]
    x, y = (draw.normal(size=(BATCH, WIDTH)).astype("f") for _ in range(2))
    return params, x, y


class Case:
    """The model, its data and its unstaged results, equal on all processes."""

    def __init__(self, directory: Path):
        self.params, self.x, self.y = data()
        self.directory = directory
        self.mesh = mesh(stage=jax.device_count())
        self.pipeline = staged(self, self.mesh)
        self.expected = jax.value_and_grad(loss_fn)(self.params, self.x, self.y)


def mesh(**axes: int) -> Mesh:
    devices = np.array(jax.devices()).reshape(*axes.values())
    return Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def staged(case: Case, on: Mesh | None, **options: Any) -> lw.Pipeline:
    """Equal stages over the axis `stage` of a mesh, or what `layerwise` chooses without one."""
    if on is None:
        return lw.layerwise(loss_fn, case.params, case.x, case.y, capacity=None, reduce="mean")
    rows = BATCH // 4 // on.shape.get("data", 1)
    layers = lw.trace_layers(loss_fn, case.params, case.x[:rows], case.y[:rows])
    boundaries = range(0, DEPTH + 1, DEPTH // on.shape["stage"])
    return lw.build_pipeline(layers, tuple(boundaries), on, 4, reduce="mean", **options)


def farthest(found: Any, expected: Any) -> float:
    """The largest difference of two trees, of which the first may be spread over processes."""
    everywhere = jax.tree.map(
        lambda x: (
            jax.jit(lambda a: a, out_shardings=NamedSharding(x.sharding.mesh, PartitionSpec()))(
                x
            ).addressable_data(0)
            if isinstance(x, jax.Array) and isinstance(x.sharding, NamedSharding)
            else x
        ),
        found,
    )
    pairs = zip(jax.tree.leaves(everywhere), jax.tree.leaves(expected), strict=True)
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)


@check
def value_and_gradients(case: Case) -> float:
    found = jax.jit(case.pipeline.value_and_grad)(case.pipeline.place(case.params), case.x, case.y)
    return farthest((found[0], case.pipeline.gather(found[1])), case.expected)


@check
def replicas_across_processes_and_within(case: Case) -> float:
    """`data` x `stage` both ways: the axis that comes first lies across the processes."""
    half = jax.device_count() // 2
    worst = 0.0
    for axes in ({"data": 2, "stage": half}, {"stage": half, "data": 2}):
        pipeline = staged(case, mesh(**axes))
        loss, grads = jax.jit(pipeline.value_and_grad)(pipeline.place(case.params), case.x, case.y)
        worst = max(worst, farthest((loss, pipeline.gather(grads)), case.expected))
    return worst


@check
def gradients_of_a_call(case: Case) -> float:
    placed = case.pipeline.place(case.params)
    found = jax.jit(jax.grad(case.pipeline))(placed, case.x, case.y)
    return farthest(case.pipeline.gather(found), case.expected[1])


@check
def place_takes_global_arrays(case: Case) -> float:
    """Spread over the devices, and replicated."""
    worst = 0.0
    for spec in (PartitionSpec("stage"), PartitionSpec()):
        sharding = NamedSharding(case.mesh, spec)
        params = jax.tree.map(
            lambda a, s=sharding: jax.make_array_from_callback(a.shape, s, lambda i: a[i]),
            case.params,
        )
        found = case.pipeline.gather(case.pipeline.place(params))
        worst = max(worst, farthest(found, case.params))
    return worst


@check
def place_takes_a_process_s_own_stages(case: Case) -> float:
    layers_of = DEPTH // jax.device_count()
    owners = [case.mesh.devices[i // layers_of].process_index for i in range(DEPTH)]
    params = [
        layer if owner == jax.process_index() else jax.eval_shape(lambda x=layer: x)
        for layer, owner in zip(case.params, owners, strict=True)
    ]
    return farthest(case.pipeline.gather(case.pipeline.place(params)), case.params)


@check
def a_process_holds_only_its_stages(case: Case) -> list[int]:
    placed = case.pipeline.place(case.params)
    held = sum(s.data.nbytes for x in placed.values() for s in x.addressable_shards)
    return [held, sum(x.nbytes for x in jax.tree.leaves(case.params))]


@check
def a_batch_as_each_process_s_own_rows(case: Case) -> float:
    rows = NamedSharding(case.mesh, PartitionSpec("stage"))
    size = BATCH // jax.process_count()
    own = slice(jax.process_index() * size, (jax.process_index() + 1) * size)
    batch = [jax.make_array_from_process_local_data(rows, a[own]) for a in (case.x, case.y)]
    value = jax.jit(case.pipeline)(case.pipeline.place(case.params), *batch)
    return abs(float(value) - float(case.expected[0]))


@check
def gather_to_shardings_that_are_asked_for(case: Case) -> list[bool]:
    placed = case.pipeline.place(case.params)
    whole = NamedSharding(case.mesh, PartitionSpec())
    everywhere = jax.tree.leaves(case.pipeline.gather(placed, out_shardings=whole))
    spread = jax.tree.leaves(case.pipeline.gather(placed))
    return [
        all(x.is_fully_replicated for x in everywhere),
        any(x.is_fully_replicated for x in spread),
    ]


@check
def training_and_checkpoints(case: Case) -> dict[str, float]:
    """Two steps, saved; two more here, and from the checkpoint on replicas of other stages."""

    def trained(pipeline: lw.Pipeline, count: int, start: Any = None) -> Any:
        step = pipeline.train_step(optax.adamw(1e-2))
        placed = pipeline.place(case.params)
        state = step.init(placed)
        if start is not None:
            saved = lw.restore_checkpoint(start, pipeline, state, optimizer=step.optimizer)
            placed, state = saved.params, saved.optimizer_state
        for _ in range(count):
            placed, state, _ = step(placed, state, case.x, case.y)
        return step, placed, state

    folder = case.directory / "steps"
    step, placed, state = trained(case.pipeline, 2)
    lw.save_checkpoint(folder, 2, case.pipeline, placed, state, optimizer=step.optimizer)
    straight = case.pipeline.gather(trained(case.pipeline, 4)[1])
    again = case.pipeline.gather(trained(case.pipeline, 2, folder)[1])
    other = staged(case, mesh(data=2, stage=jax.device_count() // 2))
    elsewhere = other.gather(trained(other, 2, folder)[1])

    tx = optax.adamw(1e-2)
    params = jax.tree.map(jnp.asarray, case.params)
    optimizer_state = tx.init(params)
    for _ in range(4):
        grads = jax.grad(loss_fn)(params, case.x, case.y)
        updates, optimizer_state = tx.update(grads, optimizer_state, params)
        params = optax.apply_updates(params, updates)
    return {
        "straight": farthest(straight, params),
        "restored": farthest(again, params),
        "restored on replicas": farthest(elsewhere, params),
    }


def ring_of(case: Case, **options: Any) -> Any:
    """A ring over all devices, and its placed parameters."""
    draw = np.random.default_rng(1)
    params = {
        "embed": draw.normal(size=(32, WIDTH)).astype("f"),
        "layers": [draw.normal(size=(WIDTH, WIDTH)).astype("f") / 6 for _ in range(DEPTH)],
    }
    cache = [jax.ShapeDtypeStruct((2, WIDTH), jnp.float32)] * DEPTH
    ring = lw.decode_ring(decode, params, cache, group_size=2, mesh=case.mesh, **options)
    return ring, ring.place(params)


@check
def tokens(case: Case) -> list[list[int]]:
    ring, placed = ring_of(case)
    generation = ring.generate(placed, [[1, 2, 3], [4], [5, 6]], max_new_tokens=5)
    return [np.asarray(x).tolist() for x in generation.tokens]


@check
def tokens_of_prompts_read_at_once(case: Case) -> bool:
    """As many prompts again as places, so that ended sequences are replaced in flight."""
    draw = np.random.default_rng(2)
    lengths = [1 + i % 4 for i in range(4 * jax.device_count())]
    prompts = [draw.integers(0, 32, n).tolist() for n in lengths]
    ring, placed = ring_of(case)
    expected = ring.generate(placed, prompts, max_new_tokens=4).tokens
    at_once, placed = ring_of(case, prefill_fn=prefill, prefill_length=4)
    found = at_once.generate(placed, prompts, max_new_tokens=4).tokens
    pairs = zip(expected, found, strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


@check
def caches(case: Case) -> float:
    """The first group's cache after a step, gathered; sums are enough to tell it."""
    ring, placed = ring_of(case)
    first = np.full((ring.num_groups, ring.group_size), 3, np.int32)
    forced = np.full((2, ring.num_groups, ring.group_size), -1, np.int32)
    places, _ = ring(placed, ring.start(first), forced)
    return sum(float(np.abs(x).sum()) for x in jax.tree.leaves(ring.gather_cache(places, 0)))


@check
def checkpoints_in_the_background(case: Case) -> float:
    """As many saves in a row as CHECKPOINTS, each of arrays that the next step was given."""
    folder = case.directory / "background"
    step = case.pipeline.train_step(optax.adamw(1e-2))
    placed = case.pipeline.place(case.params)
    state = step.init(placed)
    with lw.CheckpointWriter(folder, case.pipeline, step.optimizer, keep=2) as writer:
        for number in range(CHECKPOINTS):
            placed, state, _ = step(placed, state, case.x, case.y)
            writer.save(number, placed, state)
    expected = case.pipeline.gather(placed, NamedSharding(case.mesh, PartitionSpec()))
    saved = lw.restore_checkpoint(folder, case.pipeline, state, optimizer=step.optimizer)
    return farthest(
        case.pipeline.gather(saved.params),
        [x.addressable_data(0) for x in jax.tree.leaves(expected)],
    )


@check
def compile_with_trials(case: Case) -> float:
    placed = case.pipeline.place(case.params)
    compiled = case.pipeline.compile(placed, case.x, case.y, options="auto")
    return abs(float(compiled(placed, case.x, case.y)) - float(case.expected[0]))


@check
def plans_and_programs(case: Case) -> list[str]:
    """Digests, which are equal on all processes."""
    placed = case.pipeline.place(case.params)
    lowered = jax.jit(case.pipeline.value_and_grad).lower(placed, case.x, case.y)
    texts = [case.pipeline.plan.to_json(), lowered.as_text()]
    return [hashlib.sha256(text.encode()).hexdigest() for text in texts]


@check
def plan_prints_what_crosses_processes(case: Case) -> bool:
    """Four microbatches of float32[4, WIDTH] over the one boundary between two processes."""
    crossing = 4 * 4 * WIDTH * 4 * (jax.process_count() - 1) // 1024
    return f"cross {crossing} KiB of activations" in " ".join(str(case.pipeline.plan).split())


@check
def devices_without_a_mesh(case: Case) -> int:
    pipeline = staged(case, None)
    return pipeline.mesh.devices.size


def main(process: int, processes: int, port: int, directory: str, devices: int) -> None:
    lw.emulate_devices(devices)
    jax.distributed.initialize(
        f"127.0.0.1:{port}", processes, process, heartbeat_timeout_seconds=100
    )
    case = Case(Path(directory))
    print("FOUND " + json.dumps({name: run(case) for name, run in CHECKS.items()}), flush=True)


if __name__ == "__main__":
    index, count, at, where, emulated = sys.argv[1:]
    main(int(index), int(count), int(at), where, int(emulated))
