"""Measured and compiled sizes as tables."""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from experiments.grid import Grid

MIB = 2**20


def comparison_table(figures: Mapping[str, Any]) -> Grid:
    """One row per program: bytes for the absent device, for the real one, and their ratio."""
    absent, real = figures["absent"], figures["real"]
    columns = ["stage", "arguments", "outputs", "workspace: absent", "real", "ratio"]
    columns += ["peak: absent", "real", "ratio", "library calls: absent", "real"]
    title = (
        f"Absent: {absent['device']}, JAX {absent['jax']}. Real: {real['device']}, JAX "
        f"{real['jax']}. MiB."
    )
    rows = [
        _comparison_row(name, absent["programs"].get(name, {}), variants)
        for name, variants in real["programs"].items()
    ]
    return Grid(title, columns, rows)


def _comparison_row(name: str, absent: Mapping[str, Any], real: Mapping[str, Any]) -> list[str]:
    before, after = absent.get("default", {}), real.get("default", {})
    reason = before.get("error", "") or after.get("error", "")
    if reason or not before or not after:
        return [name, reason or "not compiled", *[""] * 9]
    cells = [_both(before, after, "argument_bytes"), _both(before, after, "output_bytes")]
    cells += [
        _mib(before["temp_bytes"]),
        _mib(after["temp_bytes"]),
        _ratio(before, after, "temp_bytes"),
    ]
    cells += [
        _mib(before["peak_bytes"]),
        _mib(after["peak_bytes"]),
        _ratio(before, after, "peak_bytes"),
    ]
    cells += [_libraries(before), _libraries(after)]
    return [name, *cells]


def _libraries(figures: Mapping[str, Any]) -> str:
    """Libraries that a program calls and that bring workspace of their own."""
    known = {"cublas": "cuBLAS", "cudnn": "cuDNN"}
    return ", ".join(
        name for key, name in known.items() if any(key in call for call in figures["library_calls"])
    )


def _both(before: Mapping[str, Any], after: Mapping[str, Any], size: str) -> str:
    """One figure if both are equal, else both."""
    same = before[size] == after[size]
    return _mib(before[size]) if same else f"{_mib(before[size])}, real {_mib(after[size])}"


def _ratio(before: Mapping[str, Any], after: Mapping[str, Any], size: str) -> str:
    if before[size] == after[size]:
        return "1"
    return f"{after[size] / before[size]:.3g}" if before[size] else "-"


def _mib(count: float) -> str:
    return f"{count / MIB:.3g}" if count < 1000 * MIB else f"{count / MIB:,.0f}"


def plans_table(planned: Sequence[Mapping[str, Any]]) -> Grid:
    """One row per model: microbatch, and sizes of stages as sums of layers and as compiled."""
    columns = [
        "model",
        "parameters",
        "stages",
        "examples a microbatch",
        "programs compiled",
        "largest stage, added up",
    ]
    columns += ["compiled", "each compiled over added up", "of the usable cache"]
    rows = []
    for figures in planned:
        stages = figures["plan"]["stages"]
        sums = [
            sum(stage[f"{part}_bytes"] for part in ("weight", "activation", "buffer"))
            for stage in stages
        ]
        compiled = [stage["compiled_bytes"] for stage in stages]
        shares = [held / added for held, added in zip(compiled, sums, strict=True)]
        cells = [
            figures["title"],
            f"{figures['parameters'] / 1e6:.1f} M",
            str(len(stages)),
            (
                f"{figures['examples'] // figures['plan']['num_microbatches']} of "
                f"{figures['examples']}"
            ),
            re.findall(r"(\d+) programs", figures["plan"]["measured_on"])[0],
            f"{_mib(max(sums))} MiB",
            f"{_mib(max(compiled))} MiB",
            f"{min(shares):.2f} to {max(shares):.2f}",
            f"{max(compiled) / figures['usable_cache_bytes']:.0%}",
        ]
        rows.append(cells)
    return Grid("", columns, rows)


def large_table(figures: Mapping[str, Any]) -> Grid:
    """One row per number of devices."""
    steps = ", ".join(f"{step} {seconds:.1f}" for step, seconds in figures["seconds"].items())
    size = (
        f"{figures['title']}: {figures['parameters'] / 1e9:.1f} billion parameters, "
        f"{figures['layers']} layers"
    )
    compiled = (
        f"{figures['layers_compiled']} programs compiled for layers, "
        f"{figures['stages_compiled']} for stages"
    )
    memory = f"{figures['peak_memory_bytes'] / 1e6:.0f} MB of memory at the most"
    columns = [
        "devices",
        "stages x replicas",
        "layers a stage",
        "largest stage: weights",
        "added up",
        "compiled",
    ]
    columns += ["all caches hold", "stages that stream", "bytes of the largest that stream, a tick"]
    title = (
        f"{size}; {compiled}; sizes from {figures['sizes_from']}.\n"
        f"{sum(figures['seconds'].values()):.1f} s in all: {steps}; {memory}."
    )
    rows = []
    for plan in figures["plans"]:
        runs = sorted({stop - start for start, stop in pairwise(plan["boundaries"])})
        cells = [
            f"{plan['devices']:,}",
            f"{plan['stages']} x {plan['replicas']}",
            f"{runs[0]} to {runs[-1]}",
            f"{plan['largest_stage_weight_bytes'] / 1e9:.2f} GB",
            f"{plan['largest_stage_bytes'] / 1e9:.2f} GB",
            f"{plan['largest_stage_compiled_bytes'] / 1e9:.2f} GB",
            f"{plan['resident_bytes'] / 1e9:.2f} GB",
            f"{len(plan['streaming'])} of {plan['stages']}",
            f"{plan['streaming_bytes'] / 1e9:.1f} GB, {1e3 * plan['streaming_seconds']:.1f} ms",
        ]
        rows.append(cells)
    return Grid(title, columns, rows)
