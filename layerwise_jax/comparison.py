"""`compare`: what a model would take under every strategy, from its trace; no accelerator is
needed.

    print(lw.compare(model.apply, params, tokens, device=lw.H100, num_devices=16))
    print(lw.compare_decode(step_fn, params, cache, batch=128, device=lw.H100, num_devices=16))

Types suffice for parameters, inputs and caches, so that a model that fits no memory can be
compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from layerwise_jax.cost.device import DeviceSpec
from layerwise_jax.cost.layer_cost import LayerCost
from layerwise_jax.decode.sampling import Sampler
from layerwise_jax.decode.step import StepFunction, trace_step
from layerwise_jax.measure.detect import detect_device
from layerwise_jax.measure.layers import measure_costs
from layerwise_jax.simulate.calibration import STOCK, Calibration
from layerwise_jax.simulate.comparison import Comparison, compare_work
from layerwise_jax.simulate.work import LayerWork, StepWork, WorkKind
from layerwise_jax.stage.cut import cut_stages
from layerwise_jax.stage.inputs import batch_size
from layerwise_jax.trace.flops import PARTIAL_READS, PARTIAL_WRITES, REDUCTIONS
from layerwise_jax.trace.layer_search import CONTRACTIONS
from layerwise_jax.trace.layers import LayerSequence, trace_layers
from layerwise_jax.trace.program import Weight, nbytes

# What XLA makes a kernel of, with whatever it fuses into it.
KERNELS = CONTRACTIONS | REDUCTIONS | PARTIAL_READS | frozenset(PARTIAL_WRITES)

# With so few products a layer is an MLP or one matrix, and is summed once over tensor ways; a block
# has attention too.
ONE_SUM = 3


def compare(
    fn: Callable[..., Any],
    params: Any,
    *inputs: Any,
    num_devices: int,
    device: DeviceSpec | None = None,
    in_axes: Any = 0,
    dtype: str | None = None,
    tokens: int = 1,
    tensor_ways: int | None = None,
    calibration: Calibration = STOCK,
) -> Comparison:
    """Predict a function for one device, replicas, tensor ways, stages and their products.

    Every structurally distinct layer is compiled once for the device, which need not be there. A
    function that returns one number (a loss) is taken to be trained: forward and backward, by 1F1B
    where there are stages.

    Args:
      fn: a JAX function `fn(params, *inputs)`.
      params: its parameters, arrays or `jax.ShapeDtypeStruct`.
      *inputs: its inputs at the full batch, likewise.
      num_devices: devices to spread it over.
      device: the device; None for the one that JAX has.
      in_axes: as in `jax.vmap`: 0 for inputs with a batch axis in front, None for others.
      dtype: what products are computed in; None for the dtype of the largest parameter.
      tokens: tokens of an example, if tokens a second are wanted.
      tensor_ways: how many ways a layer can be split at most, its heads say.
      calibration: how far programs stay behind the device's figures.

    Raises:
      ValueError: there is nothing to stage in the function, or no one batch size in the inputs.
    """
    device = device or detect_device()
    layers = trace_layers(fn, params, *inputs)
    batch = batch_size(inputs, in_axes)
    outputs = layers.signature.outputs_avals
    kind: WorkKind = "training" if len(outputs) == 1 and outputs[0].shape == () else "forward"
    found = _layer_works(layers, measure_costs(layers, device), batch, [0.0] * len(layers))
    kept = _dtype(layers.signature.params_avals)
    work = StepWork(found, batch, kind, dtype or kept, tokens, tensor_ways, kept)
    return compare_work(work, device, num_devices, calibration)


def compare_decode(
    step_fn: StepFunction,
    params: Any,
    cache: Any,
    *,
    batch: int,
    num_devices: int,
    device: DeviceSpec | None = None,
    dtype: str | None = None,
    tensor_ways: int | None = None,
    calibration: Calibration = STOCK,
) -> Comparison:
    """Predict token generation likewise; layer-wise it is a ring (`decode_ring`).

    Args:
      step_fn: `step_fn(params, cache, tokens, positions) -> (logits, cache)`, as `decode_ring`
        takes it.
      params: its parameters, arrays or `jax.ShapeDtypeStruct`.
      cache: the cache of all `batch` sequences, likewise, full: all of it is taken to be read in a
        step.
      batch: sequences.
      num_devices: as in `compare`, like all that follow.
      device: the device.
      dtype: of the products.
      tensor_ways: how many ways a layer can be split at most.
      calibration: how far programs stay behind the device's figures.

    Raises:
      ValueError, CutError: as `decode_ring`.
    """
    device = device or detect_device()
    layers, state = trace_step(step_fn, Sampler(), params, cache, batch)
    costs = measure_costs(layers, device)
    found = _layer_works(layers, costs, batch, _cache_bytes(layers, state))
    kept = _dtype(layers.signature.params_avals[: len(jax.tree.leaves(params))])
    work = StepWork(found, batch, "decode", dtype or kept, 1, tensor_ways, kept)
    return compare_work(work, device, num_devices, calibration)


def _layer_works(
    layers: LayerSequence, costs: Sequence[LayerCost], batch: int, cache_bytes: Sequence[float]
) -> tuple[LayerWork, ...]:
    """The layers' work for one example, from costs of the batch; there a cache counts as weight and
    as result.
    """
    works = []
    for layer, cost, cached, sent in zip(
        layers.layers, costs, cache_bytes, layers.boundary_bytes[1:], strict=True
    ):
        operations = [layers.program.ops[i].name for i in layer.anchors]
        weights = cost.weight_bytes - cached
        works.append(
            LayerWork(
                name=cost.name,
                weight_bytes=weights,
                flops=cost.flops / batch,
                send_bytes=sent / batch,
                activation_bytes=max(cost.activation_bytes + cost.buffer_bytes - cached, 0) / batch,
                state_bytes=cached / batch,
                kernels=sum(name in KERNELS for name in operations),
                all_reduces=1 if sum(name in CONTRACTIONS for name in operations) <= ONE_SUM else 2,
                # A layer that moves fewer bytes than it has weights looks rows up.
                lookup_bytes=max(weights - cost.bytes_accessed, 0),
            )
        )
    return tuple(works)


def _cache_bytes(layers: LayerSequence, state: Mapping[int, Weight]) -> list[float]:
    """Bytes of the cache that every layer reads."""
    avals, cached = layers.program.avals, set(state.values())
    stages = cut_stages(layers, range(len(layers) + 1))
    return [
        float(sum(nbytes(avals[x]) for x, weight in each.weights.items() if weight in cached))
        for each in stages
    ]


def _dtype(avals: Sequence[Any]) -> str:
    """The dtype of the largest parameter."""
    return str(max(avals, key=nbytes).dtype)
