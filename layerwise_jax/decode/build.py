"""Decode ring builder: traces a step, cuts it into stages and makes the ring.

    ring = lw.decode_ring(step_fn, params, cache, group_size=8)
    staged = ring.place(params)
    generation = ring.generate(staged, prompts, max_new_tokens=100)

Every layer's cache is on its own stage. As many groups of sequences are in flight as there are
stages, so that in every tick every stage works on another group; `loop.py` draws it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import Mesh

from layerwise_jax import processes
from layerwise_jax._arguments import checked_int, checked_ints
from layerwise_jax._jax import is_key
from layerwise_jax.decode.independence import check_independence
from layerwise_jax.decode.lockstep import find_cache_form
from layerwise_jax.decode.loop import RingLoop
from layerwise_jax.decode.prefill import Prefill, check_prefill
from layerwise_jax.decode.ring import DecodeRing
from layerwise_jax.decode.sampling import Sampler
from layerwise_jax.decode.sharding import InnerSharding
from layerwise_jax.decode.step import StepFunction, own_bytes, stage_step, trace_step
from layerwise_jax.decode.transport import Transport, choose_transport
from layerwise_jax.measure.layers import measured_by_shape
from layerwise_jax.mesh import DATA, STAGE, check_mesh, stage_mesh
from layerwise_jax.partition.solver import partition_layers
from layerwise_jax.plan import LoopFigures, Plan, make_plan
from layerwise_jax.trace.layers import LayerSequence
from layerwise_jax.trace.program import nbytes

# All devices run what only some stages have, and select, if its weights are at most so many bytes:
# a branch takes some 15 us on a GPU, in which an H200 reads 60 MB.
MOST_SELECTED_BYTES = 16 * 2**20


def decode_ring(
    step_fn: StepFunction,
    params: Any,
    cache: Any,
    *,
    group_size: int,
    num_groups: int | None = None,
    mesh: Mesh | None = None,
    num_stages: int | None = None,
    partition: Any = None,
    sampler: Sampler | None = None,
    stop_tokens: Sequence[int] = (),
    pad_token: int = 0,
    selects: bool | None = None,
    param_specs: Any = None,
    cache_specs: Any = None,
    prefill_fn: StepFunction | None = None,
    prefill_length: int | None = None,
    transport: str | Transport = "auto",
) -> DecodeRing:
    """Make a ring of stages from a step of token generation.

    Args:
      step_fn: `step_fn(params, cache, tokens, positions) -> (logits, cache)`: int32[sequences]
        tokens at int32[sequences] positions give float[sequences, vocabulary] logits and a cache of
        the same types.
      params: its parameters, arrays or `jax.ShapeDtypeStruct`.
      cache: the cache of one group before its first token, arrays or types; types mean zeros.
        A leaf that the step changes belongs to one layer, or is stacked over layers as by a scan.
        Its sequences are the first axis, or the second of a stacked leaf. A group shares a leaf
        without them (a counter), or one that is equal for all sequences and read of one (Flax's
        `end_index`); it then starts and ends together.
      group_size: sequences of a group.
      num_groups: groups in flight; None for one a stage, which keeps all stages busy.
      mesh: a mesh with an axis `stage`; None for one of the first local devices.
      num_stages: stages; None for one a device of the mesh, at most one a layer.
      partition: a `Partition` of the step's layers, or its boundaries; None balances bytes of
        weights and cache.
      sampler: draws tokens from logits; None takes the likeliest.
      stop_tokens: tokens that end a sequence and are its last.
      pad_token: input of an ended sequence.
      selects: whether all devices run what only some stages have (an embedding, a head) and select.
        That saves a branch, but every device reads those weights. None decides by their size.
      param_specs: specs of the parameters over the mesh axes other than `stage`: a tree of
        `PartitionSpec`, or a prefix of one. The step is then written for shards, with its own
        collectives over these axes, and returns the same logits on all of them; `params` and
        `cache` are whole.
      cache_specs: specs of the cache, in the same form.
      prefill_fn: reads prompts at once: `prefill_fn(params, cache, tokens, lengths) -> (logits,
        cache)` for int32[sequences, prefill_length] tokens padded on the right and int32[sequences]
        lengths gives float[sequences, vocabulary] logits of every prompt's last token. It has the
        layers of the step; groups are its microbatches. Cache entries behind a prompt's length must
        not matter, as where attention is masked by position. None reads prompts one token a step.
      prefill_length: tokens that it reads at most; the rest of a longer prompt is read one token a
        step. Where sequences share a part of the cache (a counter), a group is read at once only if
        all of its prompts are at least that long.
      transport: how stages pass messages: "permute", one `ppermute` an array; "peer_store", stores
        into the next device's memory by a kernel of the loop, for CUDA devices of one process;
        "auto", peer stores where the devices are there and reach each other, otherwise permute; or
        `PeerStore(wait_seconds=...)`. Tokens are the same.

    Raises:
      ValueError: an argument of another form; named with the expected form and the fix.
      CutError: the step cannot be cut into a ring's stages.
      BatchError: several groups, and the step mixes sequences.
    """
    _check_counts(num_groups=num_groups, num_stages=num_stages, prefill_length=prefill_length)
    _check(mesh, sampler, cache)
    group_size = checked_int("group_size", group_size)
    pad_token = checked_int("pad_token", pad_token, least=0)
    stop_tokens = checked_ints("stop_tokens", stop_tokens)
    check_prefill(prefill_fn, prefill_length)
    sharding = InnerSharding.of(mesh, (params, cache), (param_specs, cache_specs))
    rows = find_cache_form(step_fn, *sharding.shards, group_size, sharding.axes, cache)
    step_fn, cache_specs, cache = rows.step(step_fn), rows.specs(cache_specs), rows.split(cache)
    sharding = InnerSharding.of(mesh, (params, cache), (param_specs, cache_specs))
    # The step as one device runs it: on shards, where the mesh has more axes than `stage`.
    layers, state = trace_step(
        step_fn, sampler or Sampler(), *sharding.shards, group_size, sharding.axes
    )
    num_stages = _num_stages(mesh, num_stages, partition, len(layers))
    mesh = mesh or stage_mesh(num_stages)
    cut: Any = partition or partition_layers(measured_by_shape(layers).costs, num_stages)
    # With as many groups as stages no stage idles in the steady rounds.
    num_groups = num_groups or num_stages
    is_by_rows = check_independence(
        step_fn, *sharding.shards, group_size, num_groups, axes=sharding.axes
    )
    kinds = {weight: sharding.specs[weight.leaf] for weight in layers.program.weights.values()}
    step = stage_step(layers, state, tuple(getattr(cut, "boundaries", cut)), kinds, sharding.axes)
    step = replace(step, sequences_are_independent=step.sequences_are_independent and is_by_rows)
    # Running what only some stages have costs reading its weights; a branch costs latency.
    selecting = own_bytes(step.loop) <= MOST_SELECTED_BYTES if selects is None else selects
    placement = sharding.shard_slots(step.loop.placement)
    step = replace(step, loop=replace(step.loop, placement=placement))
    transport = choose_transport(transport, mesh)
    loop = RingLoop(step, num_groups, selecting, stop_tokens, pad_token, transport)
    sampler = sampler or Sampler()
    if prefill_fn is None or prefill_length is None:
        prefill = None
    else:
        read = rows.step(prefill_fn)
        prefill = _prefill(layers, loop, read, sampler, sharding, group_size, prefill_length)
    draws = not sampler.is_greedy
    plan = _plan(layers, cut, loop)
    return DecodeRing(layers, mesh, loop, plan, sharding, group_size, cache, rows, draws, prefill)


def _prefill(
    layers: LayerSequence,
    loop: RingLoop,
    read: StepFunction,
    sampler: Sampler,
    sharding: InnerSharding,
    group_size: int,
    length: int,
) -> Prefill:
    """The prefill program over the ring's stages, for prompts of up to `length` tokens."""
    axes = sharding.axes
    traced, state = trace_step(read, sampler, *sharding.shards, group_size, axes, length)
    prefill = Prefill.of(layers, loop, traced, state, length, axes)
    # The step was checked above; the pass over prompts may mix sequences by itself.
    check_independence(read, *sharding.shards, group_size, loop.num_groups, length, axes)
    return prefill


def _check_counts(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None:
            checked_int(name, number)


def _check(mesh: Mesh | None, sampler: Sampler | None, cache: Any) -> None:
    if sampler is not None and not isinstance(sampler, Sampler):
        raise ValueError(
            f"sampler must be None or an lw.Sampler, got {sampler!r}. None takes the likeliest "
            "token."
        )
    if mesh is not None and mesh.shape.get(DATA, 1) > 1:
        raise ValueError(
            f"mesh must have at most one replica on its axis 'data', got {mesh.shape[DATA]}. Make "
            "a ring for each replica, and give each its share of the prompts."
        )
    if any(is_key(leaf) for leaf in jax.tree.leaves(cache) if hasattr(leaf, "dtype")):
        raise ValueError(
            "cache must hold no random keys, got a leaf of them. Pass a key a sequence to "
            "generate(keys=...)."
        )


def _num_stages(mesh: Mesh | None, num_stages: int | None, partition: Any, num_layers: int) -> int:
    boundaries = getattr(partition, "boundaries", partition)
    count = len(boundaries) - 1 if boundaries is not None else num_stages
    if num_stages is not None and num_stages != count:
        raise ValueError(
            f"num_stages must be the partition's {count} stages, got {num_stages}. Pass one of "
            "them."
        )
    if count is not None and count < 1:
        raise ValueError(f"partition must have at least 1 stage, got {count}.")
    if mesh is not None:
        check_mesh(mesh, count)
        return mesh.shape[STAGE]
    return count or min(len(processes.devices()), num_layers)


def _plan(layers: LayerSequence, cut: Any, ring: RingLoop) -> Plan:
    loop = ring.loop
    return make_plan(
        cut,
        measured_by_shape(layers),
        LoopFigures(
            send_bytes=[
                sum(nbytes(loop.program.avals[x]) for x in stage.sends) for stage in loop.stages
            ],
            num_devices=loop.num_devices,
            num_microbatches=ring.num_groups,
            num_ticks=ring.length,
            padding_bytes=loop.placement.padding_bytes,
            common_layers=loop.alignment.num_layers,
            has_branch=loop.wiring.needs_branch and not ring.selects,
        ),
    )
