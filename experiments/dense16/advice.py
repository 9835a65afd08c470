"""Predicted advice by phase, size of a layer and link."""

import dataclasses
import itertools
from collections.abc import Sequence

from experiments.dense16.predictions import shape_text
from experiments.grid import Grid
from layerwise_jax.cost import H200, DeviceSpec
from layerwise_jax.simulate import (
    Prediction,
    StepWork,
    best_strategies,
    dense_decode,
    dense_prefill,
)

DEVICES = 16
# PCI Express 5.0 in one direction, or a port of 400 Gbit/s.
SLOW_LINK = 50e9
LINKS = {"NVLink, 450 GB/s": H200, "50 GB/s": dataclasses.replace(H200, link_bandwidth=SLOW_LINK)}
# Layers, heads of 128, hidden width of the MLP, context.
MODELS = {
    "16 x d=1024, 25 MB each": (16, 8, 4096, 1000),
    "16 x d=4096, 403 MB each": (16, 32, 16_384, 10_000),
    "96 x d=12288, 3.6 GB each": (96, 96, 49_152, 2000),
}
PHASES = ("decode", "prefill", "training")
BATCH = 128


def work_of(phase: str, model: str) -> StepWork:
    """The work of one step of a phase."""
    layers, heads, mlp, context = MODELS[model]
    make = dense_decode if phase == "decode" else dense_prefill
    work = make(layers=layers, heads=heads, mlp=mlp, batch=BATCH, context=context)
    return dataclasses.replace(work, kind="training") if phase == "training" else work


def advice_grid() -> Grid:
    """One row per phase and model: per link the fastest strategy, and layer-wise over the best
    tensor parallelism.
    """
    columns = ["phase", "layers"]
    for link in LINKS:
        columns += [f"{link}: fastest", "layer-wise : TP x PP", "layer-wise : fastest"]
    rows = []
    for phase, model in itertools.product(PHASES, MODELS):
        cells = [
            cell for device in LINKS.values() for cell in _advice(work_of(phase, model), device)
        ]
        rows.append([phase, model, *cells])
    return Grid("", columns, rows)


def _advice(work: StepWork, device: DeviceSpec) -> list[str]:
    ranked = sorted(
        (row for row in best_strategies(work, DEVICES, device) if row.fits_memory), key=_seconds
    )
    if not ranked:
        return ["none fits", "-", "-"]
    ours = _first(ranked, "layer-wise")
    theirs = _first(ranked, "tensor x pipeline") or _first(ranked, "tensor")
    fastest = ranked[0]
    return [
        f"{fastest.strategy.name} ({shape_text(fastest.strategy)})",
        _times(theirs, ours),
        _times(fastest, ours),
    ]


def _seconds(row: Prediction) -> float:
    return row.step_seconds


def _first(ranked: Sequence[Prediction], name: str) -> Prediction | None:
    return next((row for row in ranked if row.strategy.name == name), None)


def _times(rival: Prediction | None, ours: Prediction | None) -> str:
    return f"{rival.step_seconds / ours.step_seconds:.2f}" if rival and ours else "does not fit"
