"""Plans of models for absent devices."""

import time
from collections.abc import Sequence
from typing import Any

import layerwise_jax as lw
from experiments.memory import peak_memory_bytes
from experiments.plan_without_gpu.subjects import Subject, count_parameters
from layerwise_jax import Plan
from layerwise_jax.cost import DeviceSpec, LayerCost, capacity_bound, streaming_notes
from layerwise_jax.measure import CompiledCosts, StagingChoices
from layerwise_jax.xla import absent_mesh


def plan(subject: Subject, device: DeviceSpec) -> Plan:
    """Plan of a model for its number of devices; microbatch and cuts are chosen to fit their
    caches.

    Raises:
      CapacityError: it does not fit; the message has the verdict.
    """
    mesh = absent_mesh(device, {"stage": subject.num_devices})
    return lw.layerwise(subject.fn, subject.params, subject.batch, mesh=mesh, device=device).plan


def plan_large(
    subject: Subject, device: DeviceSpec, device_counts: Sequence[int]
) -> dict[str, Any]:
    """Plans of one model for several numbers of devices without a capacity; the excess is streamed.

    The layers are traced and measured once; each number of devices is then a partition of its own.
    Where there are more devices than layers, the pipeline is repeated over replicas.
    """
    started = time.perf_counter()
    layers = lw.trace_layers(subject.fn, subject.params, subject.batch)
    traced = time.perf_counter()
    gauge = CompiledCosts(layers, device)
    costs = gauge.costs()
    measured, layers_compiled = time.perf_counter(), gauge.num_compiles
    plans = [_streaming_plan(gauge, costs, device, count) for count in device_counts]
    return {
        "title": subject.title,
        "parameters": count_parameters(subject.params),
        "layers": len(layers),
        "layers_compiled": layers_compiled,
        "stages_compiled": gauge.num_compiles - layers_compiled,
        "sizes_from": gauge.compiler,
        "plans": plans,
        "seconds": {
            "trace": traced - started,
            "measure layers": measured - traced,
            "partition and measure stages": time.perf_counter() - measured,
        },
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _streaming_plan(
    gauge: CompiledCosts, costs: Sequence[LayerCost], device: DeviceSpec, num_devices: int
) -> dict[str, Any]:
    stages = max(k for k in range(1, len(costs) + 1) if num_devices % k == 0)
    choices = StagingChoices(lambda _: gauge.layers, 1, stages, device, None, "dp")
    partition = choices.cut(gauge.layers, costs)
    groups = [costs[start:stop] for start, stop in partition.stages]
    held = [sum(cost.size for cost in group) for group in groups]
    largest = held.index(max(held))
    excess = max(0, held[largest] - device.usable_l2_bytes)
    return {
        "devices": num_devices,
        "stages": stages,
        "replicas": num_devices // stages,
        "boundaries": partition.boundaries,
        "bottleneck_seconds": partition.bottleneck,
        "gap": partition.gap,
        "largest_stage_weight_bytes": sum(cost.weight_bytes for cost in groups[largest]),
        "largest_stage_bytes": held[largest],
        "largest_stage_compiled_bytes": gauge.stage_bytes(*partition.stages[largest]),
        "streaming_bytes": excess,
        "streaming_seconds": excess / device.memory_bandwidth,
        "resident_bytes": num_devices * device.usable_l2_bytes,
        "streaming": streaming_notes(groups, device),
        "verdict": str(capacity_bound(costs, device, num_devices)),
    }
