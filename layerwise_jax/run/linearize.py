"""VJPs of a stage's parts: the segment before the body, the body, the segment after it.

A part is a function of weights and of reads, the values of its microbatch. It is differentiated
with respect to trained weights and floating-point reads. State changes with every microbatch, so it
counts as a read; it has no gradient.

`recomputing_cheap` is the residual policy `remat="cheap"`: keep what is expensive to compute again.
`gradients_of` makes weight products in float32. With weights in bfloat16, a VJP rounds a weight's
gradient to that dtype before the accumulator adds it in float32. Here nothing is rounded, and on
GPUs the product adds into the accumulator (cuBLASLt, beta = 1):

    cotangent, activation -dot_general-> bf16 -transpose-> bf16      gradient, before
    cotangent, activation -dot_general-> f32  -transpose-> f32       gradient, after
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from layerwise_jax.run.microbatch import MicrobatchContext
from layerwise_jax.run.residuals import Residuals, StashLayout, find_residuals, share_buffers
from layerwise_jax.run.segment import StageSegment, segment_before_body
from layerwise_jax.run.stage import LocalStage
from layerwise_jax.stage.wiring import FromBody, FromBranch
from layerwise_jax.trace.derivative import is_inexact, type_of
from layerwise_jax.trace.primitives import CUSTOM_RULES, EXPENSIVE
from layerwise_jax.trace.products import flatten_backward
from layerwise_jax.trace.program import Value, evaluate

# Products, convolutions, attention, linear algebra, sorts, loops, kernels. A custom derivative rule
# (gelu, softmax) says nothing about the cost: the policy is asked for the ops inside of it.
KEPT = EXPENSIVE - CUSTOM_RULES


def linearize_body(
    device: LocalStage, context: MicrobatchContext, weights: Sequence[Any], reads: Sequence[Any]
) -> tuple[dict[int, Any], Callable]:
    """The body's results, and its VJP.

    Args:
      device: the stage.
      context: the microbatch.
      weights: the body's weights.
      reads: the values that it reads.

    Returns:
      Results by index. A function from their cotangents, by index, to a tuple of one dict: the
      gradients of trained weights and floating-point reads, by position in [*weights, *reads].
    """
    values = [*weights, *reads]
    first_read = len(weights)
    trained = [device.loop.has_gradient(j) for j in device.body_slots]
    is_differentiated = [*trained, *(is_inexact(x) for x in reads)]
    # Dicts by position: jax.vjp differentiates a whole argument, and integers have no gradient.
    arguments = {j: x for j, x in enumerate(values) if is_differentiated[j]}
    fixed = {j: x for j, x in enumerate(values) if not is_differentiated[j]}

    def run(arguments: dict[int, Any]) -> dict[int, Any]:
        given = [x for _, x in sorted({**arguments, **fixed}.items())]
        return device.run_body(context, given[:first_read], given[first_read:])

    return jax.vjp(recomputing_cheap(run) if device.recomputes_cheap else run, arguments)


def linearize_segment(
    device: LocalStage,
    segment: StageSegment,
    context: MicrobatchContext,
    weights: Mapping[Value, Any],
    reads: Mapping[Value, Any],
) -> tuple[list[Any], Callable]:
    """A segment's results, and its VJP.

    Args:
      device: a device with the segment's chunk.
      segment: the segment.
      context: the microbatch.
      weights: its weights, by value.
      reads: the values that it reads, old state included, by value.

    Returns:
      Results in the order of `segment.results`. A function from their cotangents to a tuple of one
      dict: the gradients of trained weights and floating-point reads, by value.
    """
    known = {**device.given(context, segment.stage), **weights, **reads}
    state = {x for x, j in segment.slots.items() if j in device.loop.state_slots}
    arguments = {x: known[x] for x in segment.trained}
    # old state is floating-point as well, but the next microbatch's, not this one's to change
    arguments |= {x: v for x, v in reads.items() if is_inexact(v) and x not in state}

    def run(arguments: dict[Value, Any]) -> list[Any]:
        return evaluate(segment.ops, {**known, **arguments}, segment.wanted, context.rows)

    # `after` has forward and backward in one tick: nothing of it is stashed, so nothing is saved
    is_stashed = segment.ops is not device.loop.alignment.parts[-1].after
    cheap = device.recomputes_cheap and is_stashed
    return jax.vjp(recomputing_cheap(run) if cheap else run, arguments)


def lay_out_stash(device: LocalStage, slots: Sequence[Any]) -> StashLayout:
    """Stash buffers for the residuals of all stages.

    Args:
      device: any chunk of the device.
      slots: this device's shard of every slot.
    """
    chunks = [device.of_chunk(c) for c in range(device.loop.num_chunks)]
    # Every device lays out the residuals of all stages: one program runs on all devices.
    own = {s: _segment_residuals(chunk, s, slots) for chunk in chunks for s in chunk.stages}
    places, own_avals = share_buffers(own)
    # The body is the same for all stages, and so are its residuals: chunk 0 serves for all.
    body = _body_residuals(device, slots) if device.loop.has_body else None
    results = tuple(result_aval(device, source) for source in stashed_sources(device))
    return StashLayout(results, body, own, places, own_avals)


def stashed_sources(device: LocalStage) -> list[FromBody | FromBranch]:
    """Sources of the results that backward reads: reads of `after`, and outputs."""
    kept = [source for _, source in device.wiring.kept]
    outputs = [output.source for output in device.wiring.outputs if not output.lag]
    return list(dict.fromkeys([*kept, *outputs]))  # each once, in order


def result_aval(device: LocalStage, source: FromBody | FromBranch) -> Any:
    """The type of a result."""
    if isinstance(source, FromBranch):
        return device.wiring.branch_results[source.result][0]
    return device.program.avals[device.loop.alignment.parts[0].shape.made[source.result]]


def _segment_residuals(device: LocalStage, s: int, slots: Sequence[Any]) -> Residuals:
    """Residuals of the segment before stage s's body."""
    segment = segment_before_body(device.loop, s)
    arrived = {x: type_of(device.program.avals[x]) for x in device.arriving(s)}

    def linearized(weights: Any, microbatch: Any) -> tuple[Any, Callable]:
        index, reads = microbatch
        context = MicrobatchContext(device, index)
        return linearize_segment(device, segment, context, weights, reads)

    reads = {**arrived, **segment.old_state(slots)}
    return find_residuals(linearized, segment.weights(slots), (_INDEX, reads))


def _body_residuals(device: LocalStage, slots: Sequence[Any]) -> Residuals:
    """Residuals of the common body."""
    shape = device.loop.alignment.parts[0].shape
    reads = [type_of(device.program.avals[x]) for x in shape.reads]

    def linearized(weights: Any, microbatch: Any) -> tuple[Any, Callable]:
        index, reads = microbatch
        return linearize_body(device, MicrobatchContext(device, index), weights, reads)

    weights = [slots[j] for j in device.body_slots]
    return find_residuals(linearized, weights, (_INDEX, reads))


_INDEX = jax.ShapeDtypeStruct((), jnp.int32)  # of a microbatch


def recomputing_cheap(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, whose VJP keeps only results of expensive ops, and its arguments.

    `jax.checkpoint` policies inside of `run` still apply: they keep no more than without this one.
    """
    # prevent_cse: forward and backward are in different ticks, so there is nothing to merge
    return jax.checkpoint(run, policy=is_expensive, prevent_cse=False)


def is_expensive(primitive: Any, *_: Any, **params: Any) -> bool:
    """A policy of `jax.checkpoint`: True for results that are kept."""
    del params
    # attention of a library: wrapped under names that differ between JAX versions
    return primitive.name in KEPT or "dot_product_attention" in primitive.name


def gradients_of(
    vjp_fn: Callable, cotangents: Any, weights: Mapping[Hashable, Any]
) -> dict[Any, Any]:
    """The gradients that `vjp_fn` returns, those of narrow weights in float32 where possible.

    Args:
      vjp_fn: a VJP function of one dict.
      cotangents: its argument.
      weights: the weights among the dict's entries, by key.
    """
    narrow = {key for key, weight in weights.items() if _is_narrow(weight.dtype)}
    # A VJP function is a pytree of its residuals: a jaxpr must not close over traced arrays.
    leaves, tree = jax.tree.flatten((vjp_fn, cotangents))
    keys: list[Any] = []

    def run(*leaves: Any) -> list[Any]:
        rebuilt, given = jax.tree.unflatten(tree, leaves)
        (gradients,) = rebuilt(given)
        # gradients of narrow weights first
        keys[:] = sorted(gradients, key=lambda key: key not in narrow)
        return [gradients[key] for key in keys]

    if narrow:
        closed = jax.make_jaxpr(run)(*leaves)
        # None: a checkpoint forbids to open the jaxpr
        backward = flatten_backward(closed, len(narrow.intersection(keys)), 0)
        if backward is not None:
            return dict(zip(keys, backward.run(leaves, widens=True), strict=True))
    (gradients,) = vjp_fn(cotangents)
    return gradients


def _is_narrow(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize < 4
