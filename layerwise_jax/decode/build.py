"""Decode ring builder: traces a step, cuts it into stages and makes the ring.

    ring = lw.decode_ring(step_fn, params, cache, group_size=8)
    staged = ring.place(params)
    generation = ring.generate(staged, prompts, max_new_tokens=100)

Every layer's cache is on its own stage. As many groups of sequences are in flight as there are
stages, so that in every tick every stage works on another group; `loop.py` draws it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
from jax.sharding import Mesh

from layerwise_jax import processes
from layerwise_jax._arguments import checked_int
from layerwise_jax._jax import is_key
from layerwise_jax.decode.independence import check_independence
from layerwise_jax.decode.lockstep import find_cache_form
from layerwise_jax.decode.loop import RingLoop
from layerwise_jax.decode.options import DecodeOptions
from layerwise_jax.decode.prefill import Prefill
from layerwise_jax.decode.ring import DecodeRing
from layerwise_jax.decode.sharding import InnerSharding
from layerwise_jax.decode.step import StepFunction, own_bytes, stage_step, trace_step
from layerwise_jax.decode.transport import choose_transport
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
    mesh: Mesh | None = None,
    num_stages: int | None = None,
    partition: Any = None,
    options: DecodeOptions | None = None,
    **choices: Any,
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
      mesh: a mesh with an axis `stage`; None for one of the first local devices.
      num_stages: stages; None for one a device of the mesh, at most one a layer.
      partition: a `Partition` of the step's layers, or its boundaries; None balances bytes of
        weights and cache.
      options: how tokens are drawn, stopped, read at once and passed on; None for the defaults.
      **choices: single options by name, which replace those in `options`: see `DecodeOptions`.

    Raises:
      ValueError: an argument of another form; named with the expected form and the fix.
      CutError: the step cannot be cut into a ring's stages.
      BatchError: several groups, and the step mixes sequences.
    """
    options = (options or DecodeOptions()).updated(**choices)
    num_stages = None if num_stages is None else checked_int("num_stages", num_stages)
    group_size = checked_int("group_size", group_size)
    _check(mesh, cache)
    param_specs, cache_specs = options.param_specs, options.cache_specs
    sharding = InnerSharding.of(mesh, (params, cache), (param_specs, cache_specs))
    rows = find_cache_form(step_fn, *sharding.shards, group_size, sharding.axes, cache)
    step_fn, cache_specs, cache = rows.step(step_fn), rows.specs(cache_specs), rows.split(cache)
    sharding = InnerSharding.of(mesh, (params, cache), (param_specs, cache_specs))
    # The step as one device runs it: on shards, where the mesh has more axes than `stage`.
    layers, state = trace_step(step_fn, options.draw, *sharding.shards, group_size, sharding.axes)
    num_stages = _num_stages(mesh, num_stages, partition, len(layers))
    mesh = mesh or stage_mesh(num_stages)
    cut: Any = partition or partition_layers(measured_by_shape(layers).costs, num_stages)
    # With as many groups as stages no stage idles in the steady rounds.
    num_groups = options.num_groups or num_stages
    is_by_rows = check_independence(
        step_fn, *sharding.shards, group_size, num_groups, axes=sharding.axes
    )
    kinds = {weight: sharding.specs[weight.leaf] for weight in layers.program.weights.values()}
    step = stage_step(layers, state, tuple(getattr(cut, "boundaries", cut)), kinds, sharding.axes)
    step = replace(step, sequences_are_independent=step.sequences_are_independent and is_by_rows)
    # Running what only some stages have costs reading its weights; a branch costs latency.
    selecting = options.selects
    if selecting is None:
        selecting = own_bytes(step.loop) <= MOST_SELECTED_BYTES
    placement = sharding.shard_slots(step.loop.placement)
    step = replace(step, loop=replace(step.loop, placement=placement))
    transport = choose_transport(options.transport, mesh)
    loop = RingLoop(step, num_groups, selecting, options.stop_tokens, options.pad_token, transport)
    if options.prefill_fn is None:
        prefill = None
    else:
        read = options.updated(prefill_fn=rows.step(options.prefill_fn))
        prefill = _prefill(layers, loop, read, sharding, group_size)
    draws = not options.draw.is_greedy
    plan = _plan(layers, cut, loop)
    return DecodeRing(layers, mesh, loop, plan, sharding, group_size, cache, rows, draws, prefill)


def _prefill(
    layers: LayerSequence,
    loop: RingLoop,
    options: DecodeOptions,
    sharding: InnerSharding,
    group_size: int,
) -> Prefill:
    """The prefill program over the ring's stages, for prompts of up to `prefill_length` tokens."""
    read, length, axes = options.prefill_fn, options.prefill_length, sharding.axes
    assert read is not None
    assert length is not None
    traced, state = trace_step(read, options.draw, *sharding.shards, group_size, axes, length)
    prefill = Prefill.of(layers, loop, traced, state, length, axes)
    # The step was checked above; the pass over prompts may mix sequences by itself.
    check_independence(read, *sharding.shards, group_size, loop.num_groups, length, axes)
    return prefill


def _check(mesh: Mesh | None, cache: Any) -> None:
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
