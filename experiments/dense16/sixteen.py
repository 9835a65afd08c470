"""Programs of all strategies for sixteen devices: compiled for absent GPUs, run on emulated
devices.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from experiments.dense16.model import Dense, random_array
from experiments.dense16.predictions import Setup, shape_text
from experiments.dense16.strategies import fitting, make_strategy
from experiments.dense16.timing import DecodeRun, compile_all, digest
from layerwise_jax.cost import DeviceSpec
from layerwise_jax.simulate import Strategy
from layerwise_jax.xla import absent_devices

# The program is the same loop for any number of steps.
STEPS = 4
EMULATED_STEPS = 6

Progress = Callable[[str], None]


def shapes(setup: Setup) -> list[Strategy]:
    """Strategies that are compiled: the paper's two, and the rivals."""
    n = setup.devices
    found = [
        Strategy("replicas", data=n),
        Strategy("tensor", tensor=n),
        setup.baseline,
        Strategy("layer-wise", stage=n),
    ]
    if n % 2 == 0 and n > 4:
        found.append(Strategy("layer-wise + tensor", stage=n // 2, tensor=2))
    return found


def compile_absent(setup: Setup, device: DeviceSpec, progress: Progress) -> dict[str, Any]:
    """Compiles every strategy for absent devices; bytes per device, by strategy and shape.

    cuDNN's attention needs the library and a GPU to be compiled; here it is what XLA makes of
    products and sums, which has the same arguments and a larger workspace.
    """
    model = dataclasses.replace(setup.model, attention="xla")
    devices = absent_devices(device, setup.devices)
    found = {}
    for strategy in shapes(setup):
        label = f"{strategy.name}, {shape_text(strategy)}"
        progress(label)
        found[label] = _compiled_sizes(model, strategy, devices)
    return found


def _compiled_sizes(model: Dense, strategy: Strategy, devices: list[Any]) -> dict[str, int]:
    """Bytes of one device's program: arguments, workspace, total."""
    ways = {axis: size for axis, size in strategy.mesh.items() if size > 1}
    sizes = make_strategy(strategy.name, model, devices, **ways).compile(STEPS).memory_analysis()
    own_outputs = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return {
        "argument_bytes": sizes.argument_size_in_bytes,
        "temp_bytes": sizes.temp_size_in_bytes,
        "bytes_per_device": sizes.argument_size_in_bytes + own_outputs + sizes.temp_size_in_bytes,
    }


def emulate(model: Dense, count: int, threads: int, progress: Progress) -> list[dict[str, Any]]:
    """Runs all strategies on emulated devices; bytes, and the share of tokens equal to one
    device's.

    Emulated devices share the cores of one machine, so that nothing is timed.

    Raises:
      RuntimeError: a strategy failed.
    """
    devices = jax.local_devices()[:count]
    here = SingleDeviceSharding(devices[0])
    params = partial(model.params, random_array(model, 0, here))
    cache = partial(model.cache, model.batch, random_array(model, 1, here))
    runs = {}
    for name, ways in fitting(model, count):
        strategy = make_strategy(name, model, devices, **ways)
        runs[name] = DecodeRun(strategy, params, cache, (EMULATED_STEPS, EMULATED_STEPS))
    progress(f"compiling {len(runs)} strategies for {count} emulated devices")
    programs = compile_all(runs, _raise, threads)
    for name, each in runs.items():
        progress(f"running {name}")
        each.prepare()
        each.seconds(EMULATED_STEPS)
    first = runs["one device"].tokens
    return [
        {
            "kind": "tokens",
            "strategy": name,
            "mesh": each.strategy.shape,
            "model": model.record(),
            "batch": model.batch,
            "context": model.context,
            "steps": EMULATED_STEPS,
            "bytes_per_device": programs[name].device_bytes,
            "compile_seconds": programs[name].seconds,
            "tokens_digest": digest(each.tokens),
            "same_tokens": float(np.mean(np.equal(first, each.tokens))),
        }
        for name, each in runs.items()
    ]


def _raise(name: str, error: Exception) -> None:
    raise RuntimeError(f"{name} failed on emulated devices: {error}") from error
