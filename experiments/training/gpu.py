"""Training step of a GPT on several GPUs: layer-wise, one device, replicas, tensor parallel, FSDP.

    python -m experiments.training.gpu                  # 1.1 billion parameters, all local GPUs
    python -m experiments.training.gpu --platform=cpu --devices=2 --preset=tiny   # emulated devices

All strategies train the same model on the same global batches from the same parameters, in one
process: bfloat16 with float32 master weights and AdamW; parameters and moments are donated. They
take turns, and each turn starts from the initial parameters: losses compare, and slow drifts of the
machine affect all strategies. A strategy that fails, or that the time does not suffice for, is
recorded with the reason. Writes JSON after every strategy, then a table and a picture.
"""

import datetime
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import flax
import jax
import jaxlib
import numpy as np
import optax
from absl import app, flags
from jax.extend.backend import get_backend
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments import command
from experiments.training import gpu_rivals as rivals
from experiments.training.gpu_host import HostStrategy, host_driven
from experiments.training.gpu_measure import (
    Compiled,
    compile_step,
    loss_differences,
    run_turn,
    summary,
)
from experiments.training.gpu_model import AttentionKernel, Model, draw_batches
from experiments.training.gpu_report import draw, print_table
from experiments.training.gpu_staged import layer_wise
from experiments.training.gpu_strategies import Strategy
from layerwise_jax.cost import H200

# depth, width, heads, vocabulary; sequence; examples; microbatches.
PRESETS = {
    "full": ("20,2048,16,32768", 1024, 64, ["16", "8", "32"]),
    "tiny": ("4,64,4,256", 32, 16, ["4", "8"]),
}
RIVALS = ("one", "replicas", "tensor", "fsdp")
LAYER_WISE = ("stored", "recomputed")
# Executor `host`: (what forward keeps, weight gradients that each later stage defers).
HOST: dict[str, tuple[Literal["cheap", "stage"] | None, int]] = {
    "host": (None, 0),
    "host_cheap": ("cheap", 0),
    "host_recomputed": ("stage", 0),
    "host_deferred": (None, 4),
    "host_cheap_deferred": ("cheap", 4),
}
# The share of the time after which nothing more is compiled, so that what is compiled can still
# run.
COMPILING_SHARE = 0.6
SCHEDULER = {"xla_gpu_enable_latency_hiding_scheduler": True}

PLATFORM = flags.DEFINE_enum("platform", "gpu", ["gpu", "cpu"], "platform to run on")
DEVICES = flags.DEFINE_integer(
    "devices", None, "devices (default: all; on the CPU two emulated ones)"
)
PRESET = flags.DEFINE_enum(
    "preset",
    "full",
    list(PRESETS),
    "sizes; --size, --sequence, --batch and --microbatches change each",
)
SIZE = flags.DEFINE_string("size", None, "depth,width,heads,vocabulary")
SEQUENCE = flags.DEFINE_integer("sequence", None, "tokens per example")
BATCH = flags.DEFINE_integer("batch", None, "examples per global batch")
MICROBATCHES = flags.DEFINE_list(
    "microbatches", None, "numbers of microbatches of the layer-wise strategies"
)
STRATEGIES = flags.DEFINE_list(
    "strategies",
    [*RIVALS, *LAYER_WISE],
    f"strategies to run, of {', '.join((*RIVALS, *LAYER_WISE, 'cheap', *HOST))}",
)
ACCUMULATE = flags.DEFINE_integer(
    "accumulate", 2, "microbatches over which one device accumulates gradients"
)
ATTENTION = flags.DEFINE_enum(
    "attention",
    "auto",
    ["auto", "cudnn", "xla"],
    "attention kernel; auto is cuDNN's if it runs, else XLA's",
)
ROUNDS = flags.DEFINE_integer("rounds", 3, "turns of every strategy", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 4, "steps per turn; the first is not timed", lower_bound=2)
SECONDS = flags.DEFINE_float(
    "seconds", 270, "time limit in seconds; strategies that do not fit are recorded as left out"
)
COMPILE_THREADS = flags.DEFINE_integer(
    "compile_threads", 4, "strategies compiled at the same time", lower_bound=1
)
HIDE_LATENCY = flags.DEFINE_bool(
    "hide_latency", True, "compile with XLA's latency-hiding scheduler"
)
OUTPUT = flags.DEFINE_string(
    "output", "gpu.json", "JSON file in the output folder, or an absolute path"
)
flags.adopt_module_key_flags(command)


class Clock:
    """Elapsed time against its limit."""

    def __init__(self, limit: float):
        self.started, self.limit = time.perf_counter(), limit

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    def is_past(self, share: float) -> bool:
        return self.elapsed > share * self.limit


def main(argv: list[str]) -> None:
    command.refuse_arguments(argv)
    clock = Clock(SECONDS.value)
    devices = start_backend()
    model, examples, microbatches = choices(devices)
    batches = draw_batches(model, examples, STEPS.value)
    results = described(model, examples, devices)
    say(
        clock,
        f"{model}, {model.num_parameters / 1e9:.3f} billion parameters, {examples} examples a step",
    )
    params = everywhere(model, devices)
    compiled = compile_all(builders(model, devices, examples, microbatches), results, clock)
    take_turns(compiled, params, batches, results, clock)
    time_programs(compiled, params, batches, results, clock)
    print_table(results)
    draw(results, output_path().with_suffix(".png"))
    say(clock, f"written to {output_path()}, and a picture beside it")


def start_backend() -> list[Any]:
    """Starts JAX and returns the devices; emulated ones are asked for first."""
    jax.config.update("jax_platforms", "cpu" if PLATFORM.value == "cpu" else "cuda")
    if PLATFORM.value == "cpu":
        jax.config.update("jax_num_cpu_devices", DEVICES.value or 2)
    else:
        # The largest strategy needs more than the three quarters of memory that JAX would take.
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.93")
    return jax.local_devices()[: DEVICES.value]


def choices(devices: list[Any]) -> tuple[Model, int, list[int]]:
    """Model, examples per global batch and numbers of microbatches, from the preset and the
    flags.
    """
    size, sequence, examples, microbatches = PRESETS[PRESET.value]
    depth, width, heads, vocabulary = map(int, (SIZE.value or size).split(","))
    sequence = SEQUENCE.value or sequence
    kernel = attention_kernel(heads, width // heads, sequence, devices[0].platform)
    model = Model(depth, width, heads, vocabulary, sequence, kernel)
    return model, BATCH.value or examples, [int(m) for m in MICROBATCHES.value or microbatches]


def attention_kernel(heads: int, features: int, sequence: int, platform: str) -> AttentionKernel:
    """The selected kernel; "auto" is cuDNN's unless it fails on one example."""
    if ATTENTION.value != "auto":
        return cast(AttentionKernel, ATTENTION.value)
    if platform == "cpu":
        return "xla"
    x = jax.numpy.ones((1, sequence, heads, features), jax.numpy.bfloat16)

    def total(x: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(x, x, x, is_causal=True, implementation="cudnn").sum()

    try:
        jax.block_until_ready(jax.jit(jax.grad(total))(x))
    except Exception as error:
        print(
            f"cuDNN's attention does not run here, XLA's is taken: {_reason(error)}",
            file=sys.stderr,
        )
        return "xla"
    return "cudnn"


def everywhere(model: Model, devices: list[Any]) -> Any:
    """Initial parameters, replicated on all devices; every turn starts from them."""
    mesh = Mesh(np.array(devices), ("device",), axis_types=(AxisType.Auto,))
    return jax.block_until_ready(
        jax.device_put(model.initial(), NamedSharding(mesh, PartitionSpec()))
    )


def builders(
    model: Model, devices: list[Any], examples: int, microbatches: list[int]
) -> dict[str, Callable[[], Compiled]]:
    """Functions that make the selected strategies, by name, the most important first."""
    options = SCHEDULER if HIDE_LATENCY.value and devices[0].platform == "gpu" else {}
    shape = (examples, model.sequence + 1)
    makers: dict[str, Callable[[], Strategy]] = {
        "one": lambda: rivals.one_device(model, devices[0], ACCUMULATE.value, options),
        "replicas": lambda: rivals.replicas(model, devices, options),
        "fsdp": lambda: rivals.fully_sharded(model, devices, options),
        "tensor": lambda: rivals.tensor_parallel(model, devices, options),
    }
    wanted = {
        name: partial(_compile, make, shape)
        for name, make in makers.items()
        if name in STRATEGIES.value
    }
    remats: dict[str, Literal["stage", "cheap"] | None] = {
        "stored": None,
        "recomputed": "stage",
        "cheap": "cheap",
    }
    staged: dict[str, Callable[[], Compiled]] = {}
    for count in microbatches:
        sizes = (model, devices, examples, count)
        for kind, remat in remats.items():
            if kind in STRATEGIES.value:
                make = partial(layer_wise, *sizes, remat, options)
                staged[f"{kind}, M = {count}"] = partial(_compile, make, shape)
        for kind, (kept, deferred) in HOST.items():
            if kind in STRATEGIES.value:
                make_host = partial(host_driven, *sizes, kept, options, deferred)
                staged[f"{kind}, M = {count}"] = make_host
    # What all losses are compared with comes first, then one layer-wise run, then its rivals, then
    # its variants.
    order = sorted(
        [*wanted, *staged],
        key=lambda name: (name != "one", name != next(iter(staged), ""), name in staged),
    )
    return {name: (wanted | staged)[name] for name in order}


def _compile(make: Callable[[], Strategy], tokens_shape: tuple[int, ...]) -> Compiled:
    return compile_step(make(), tokens_shape)


def compile_all(
    makers: dict[str, Callable[[], Compiled]],
    results: dict[str, Any],
    clock: Clock,
) -> list[Compiled]:
    """Compiles all strategies that time allows; failures go into the results."""

    def compile_one(make: Callable[[], Compiled]) -> Compiled | str:
        if clock.is_past(COMPILING_SHARE):
            return "not compiled: the time was up"
        try:
            return make()
        except Exception as error:
            return _reason(error)

    compiled = []
    # The compiler times kernels under a lock on the GPU, so that programs compiled at once do not
    # disturb each other.
    with ThreadPoolExecutor(COMPILE_THREADS.value) as threads:
        for name, each in zip(makers, threads.map(compile_one, makers.values()), strict=True):
            if isinstance(each, str):
                record_failure(results, name, each)
                continue
            strategy = each.strategy
            about = {
                "how": strategy.how,
                "devices": strategy.devices,
                **strategy.figures,
                **each.figures,
            }
            results["strategies"][strategy.name] = about
            say(
                clock,
                f"{strategy.name}: {about['compile_seconds']:.1f} s to compile, "
                f"{about['device_bytes']:,} bytes",
            )
            write(results)
            compiled.append(each)
    return compiled


def take_turns(
    compiled: list[Compiled],
    params: Any,
    batches: np.ndarray,
    results: dict[str, Any],
    clock: Clock,
) -> None:
    """Runs the turns of all strategies, round by round; one that fails takes no further turn."""
    turns: dict[str, list[dict[str, Any]]] = {each.strategy.name: [] for each in compiled}
    for number in range(ROUNDS.value):
        for each in compiled:
            name = each.strategy.name
            if "error" in results["strategies"][name] or clock.is_past(1):
                continue
            try:
                turn = run_turn(each, params, batches)
            except Exception as error:
                record_failure(results, name, _reason(error))
                continue
            turns[name].append(turn)
            say(
                clock,
                f"round {number}: {name}: {min(turn['seconds']):.4f} s, last loss "
                f"{turn['losses'][-1]:.4f}",
            )
        conclude(results, compiled, turns, clock)


def time_programs(
    compiled: list[Compiled],
    params: Any,
    batches: np.ndarray,
    results: dict[str, Any],
    clock: Clock,
) -> None:
    """The timeline of what runs on executor `host`: where its step goes."""
    for each in compiled:
        about = results["strategies"][each.strategy.name]
        if not isinstance(each.strategy, HostStrategy) or "error" in about or clock.is_past(1):
            continue
        tokens = jax.device_put(batches[0], each.strategy.tokens)
        about["timeline"] = each.strategy.timeline(params, tokens)
        say(clock, f"{each.strategy.name}:\n{about['timeline']}")
        write(results)


def conclude(
    results: dict[str, Any],
    compiled: list[Compiled],
    turns: dict[str, list[dict[str, Any]]],
    clock: Clock,
) -> None:
    """Puts the figures of all turns so far into the results."""
    for each in compiled:
        about = results["strategies"][each.strategy.name]
        if turns[each.strategy.name]:
            about.update(
                summary(
                    turns[each.strategy.name],
                    each.strategy.devices,
                    results["tokens_per_step"],
                    results["step_flops"],
                    results["peak_flops_per_second"],
                )
            )
        elif "error" not in about:
            about["error"] = "not run: the time was up"
    results["loss_differences"] = loss_differences(results["strategies"])
    results["seconds_in_all"] = clock.elapsed
    write(results)


def described(model: Model, examples: int, devices: list[Any]) -> dict[str, Any]:
    """Results without strategies: machine, versions, command and sizes."""
    now = datetime.datetime.now(tz=datetime.UTC)
    return {
        "date": now.isoformat(timespec="seconds"),
        "command": " ".join(["python -m experiments.training.gpu", *sys.argv[1:]]),
        "machine": {
            "devices": [device.device_kind for device in devices],
            "cores": os.cpu_count(),
            "platform": get_backend().platform_version.split("\n"),
        },
        "versions": {
            "python": sys.version.split()[0],
            **{module.__name__: module.__version__ for module in (jax, jaxlib, flax, optax, np)},
        },
        "model": asdict(model),
        "parameters": model.num_parameters,
        "examples": examples,
        "tokens_per_step": examples * model.sequence,
        "step_flops": model.step_flops(examples),
        "peak_flops_per_second": H200.flops_per_second["bfloat16"],
        "rounds": ROUNDS.value,
        "steps_per_turn": STEPS.value,
        "compiled_at_a_time": COMPILE_THREADS.value,
        "strategies": {},
    }


def record_failure(results: dict[str, Any], name: str, reason: str) -> None:
    results["strategies"].setdefault(name, {})["error"] = reason
    print(f"{name} failed: {reason}", file=sys.stderr, flush=True)
    write(results)


def _reason(error: Exception) -> str:
    traceback.print_exception(error)
    return f"{type(error).__name__}: {error}"[:2000]


def output_path() -> Path:
    """The JSON file: in the output folder, unless --output is absolute."""
    return command.output("training").folder / OUTPUT.value


def write(results: dict[str, Any]) -> None:
    path = output_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def say(clock: Clock, text: str) -> None:
    print(f"{clock.elapsed:6.1f} s  {text}", flush=True)


if __name__ == "__main__":
    app.run(main)
