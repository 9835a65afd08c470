"""`compare`: predicted time and memory of a model under every strategy, from its trace.

No accelerator is needed.

    print(lw.compare(model.apply, params, tokens, device=lw.H100, num_devices=16))
    print(lw.compare_decode(step_fn, params, cache, batch=128, device=lw.H100, num_devices=16))

Parameters, inputs and caches may be types, so that a model larger than any memory can be compared.
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
from layerwise_jax.trace.layers import LayerSequence, trace_layers
from layerwise_jax.trace.primitives import LAYER_STARTS, XLA_KERNELS
from layerwise_jax.trace.program import Weight, nbytes

# Up to this many products a layer is an MLP or one matrix, with one all-reduce over tensor ways. A
# block with attention has more, and two all-reduces.
ONE_ALL_REDUCE = 3


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
    """Predict a function on one device, under data, tensor and pipeline parallelism, and combined.

    Compiles every structurally distinct layer once for the device, which need not be present. A
    function that returns one scalar (a loss) counts as training: forward and backward, in the order
    of 1F1B where there are stages.

    Args:
      fn: a JAX function `fn(params, *inputs)`.
      params: its parameters, arrays or `jax.ShapeDtypeStruct`.
      *inputs: its inputs at the full batch, arrays or types.
      num_devices: devices that every strategy uses.
      device: the device; None for the local one.
      in_axes: as in `jax.vmap`: 0 for inputs with a leading batch axis, None for others.
      dtype: dtype of the matrix products; None for the dtype of the largest parameter.
      tokens: tokens of an example, for a prediction in tokens per second.
      tensor_ways: the largest number of tensor ways, for example the number of heads.
      calibration: efficiency factors, achieved over nominal performance.

    Raises:
      ValueError: the function has no layer, or the inputs differ in their batch size.
    """
    device = device or detect_device()
    layers = trace_layers(fn, params, *inputs)
    batch = batch_size(inputs, in_axes)
    outputs = jax.tree.leaves(layers.signature.outputs(layers.signature.outputs_avals))
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
    """Predict token generation under every strategy; the layer-wise one is `decode_ring`.

    Args:
      step_fn: `step_fn(params, cache, tokens, positions) -> (logits, cache)`, as `decode_ring`
        takes it.
      params: its parameters, arrays or `jax.ShapeDtypeStruct`.
      cache: the cache of all `batch` sequences, arrays or types; a step reads all of it.
      batch: number of sequences.
      num_devices: as in `compare`.
      device: as in `compare`.
      dtype: as in `compare`.
      tensor_ways: as in `compare`.
      calibration: as in `compare`.

    Raises:
      ValueError, CutError: `decode_ring` would refuse the function.
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
    """Work of every layer for one example, from the costs of the batch.

    The costs count a cache twice, as a weight and as a result; here it is the layer's state.

    Args:
      layers: the layers of the batch.
      costs: the cost of every layer.
      batch: examples of the batch.
      cache_bytes: bytes of cache of every layer.
    """
    works = []
    for layer, cost, cached, sent in zip(
        layers.layers, costs, cache_bytes, layers.boundary_bytes[1:], strict=True
    ):
        operations = [layers.program.ops[i].name for i in layer.pinned]
        num_products = sum(name in LAYER_STARTS for name in operations)
        weights = cost.weight_bytes - cached
        works.append(
            LayerWork(
                name=cost.name,
                weight_bytes=weights,
                flops=cost.flops / batch,
                send_bytes=sent / batch,
                activation_bytes=max(cost.activation_bytes + cost.buffer_bytes - cached, 0) / batch,
                state_bytes=cached / batch,
                kernels=sum(name in XLA_KERNELS for name in operations),
                all_reduces=1 if num_products <= ONE_ALL_REDUCE else 2,
                # A layer that accesses fewer bytes than its weights have is a lookup table.
                lookup_bytes=max(weights - cost.bytes_accessed, 0),
            )
        )
    return tuple(works)


def _cache_bytes(layers: LayerSequence, state: Mapping[int, Weight]) -> list[float]:
    """Bytes of cache that each layer reads."""
    avals, cached = layers.program.avals, set(state.values())
    stages = cut_stages(layers, range(len(layers) + 1))
    return [
        float(sum(nbytes(avals[x]) for x, weight in each.weights.items() if weight in cached))
        for each in stages
    ]


def _dtype(avals: Sequence[Any]) -> str:
    """The dtype of the largest parameter."""
    return str(max(avals, key=nbytes).dtype)
