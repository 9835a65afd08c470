"""Predictions for the paper's experiment: capacity law, bounds, rates of all strategies."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.dense16.model import Dense
from experiments.dense16.paper import BASELINE, BASELINE_STAGES, CLAIMS, LAYER_WISE
from experiments.grid import Grid, count, gigabytes, milliseconds
from layerwise_jax.cost import CapacityBound, DeviceSpec, LayerCost, capacity_bound
from layerwise_jax.simulate import (
    ALL_REDUCES_PER_LAYER,
    Prediction,
    StepWork,
    Strategy,
    best_strategies,
    dense_decode,
    ideal_per_second,
    predict,
    ring_all_reduce_bytes,
)

ALL_REDUCE_SECONDS = 20e-6


@dataclass(frozen=True)
class Setup:
    """Decoding experiment: a network and its number of devices."""

    model: Dense
    devices: int

    @property
    def work(self) -> StepWork:
        model = self.model
        return dense_decode(
            layers=model.layers,
            heads=model.heads,
            head_dim=model.head_dim,
            mlp=model.mlp,
            batch=model.batch,
            context=model.context,
            dtype=model.dtype,
        )

    @property
    def baseline(self) -> Strategy:
        """The paper's baseline, or the nearest shape that these devices allow."""
        stages = BASELINE_STAGES if self.devices % BASELINE_STAGES == 0 else 1
        return Strategy(BASELINE.strategy, stage=stages, tensor=self.devices // stages)


def cache_verdict(setup: Setup, device: DeviceSpec) -> CapacityBound:
    """Capacity law for the network's layers in 16 bits."""
    weights = 2 * setup.model.layer_weights
    costs = [LayerCost(f"layer {i}", weights, 0, 0) for i in range(setup.model.layers)]
    return capacity_bound(costs, device, setup.devices)


def verdict_text(setup: Setup, device: DeviceSpec) -> str:
    """Sentences on the capacity law and the paper's constraint."""
    found, model = cache_verdict(setup, device), setup.model
    ways = found.tensor_ways
    fits = "fits" if found.is_resident else "breaks its own constraint"
    return (
        f"A layer has {model.layer_weights:,} weights, {found.largest_layer_bytes / 1e6:.1f} MB "
        "in 16 bits: "
        f"{found.largest_layer_bytes / device.l2_bytes:.1f} times the L2 of a {device.name} "
        f"({device.l2_bytes / 1e6:.1f} MB, of which {device.usable_l2_bytes / 1e6:.1f} MB are "
        "read at its speed). All "
        f"{model.layers} are {found.weight_bytes / 1e9:.2f} GB against "
        f"{found.resident_bytes / 1e9:.2f} GB in "
        f"{setup.devices} devices, so that the experiment {fits}. A layer must be split "
        f"{ways[16]} ways at fp16, "
        f"{ways[8]} at fp8, {ways[4]} at 4 bits. Keys and values are "
        f"{model.batch * model.sequence_bytes / 1e9:.2f} GB "
        f"a layer at context {model.context:,} and batch {model.batch}."
    )


def rows_to_show(setup: Setup, device: DeviceSpec) -> list[Prediction]:
    """The best row of every strategy and the paper's baseline, the fastest first.

    Of the products of replicas with something else only the best is shown, if it is the best of
    all.
    """
    ranked = sorted(best_strategies(setup.work, setup.devices, device), key=_rank)
    shown: dict[str, Prediction] = {}
    for row in ranked:
        if row is ranked[0] or not row.strategy.name.startswith("replicas x "):
            shown.setdefault(row.strategy.name, row)
    baseline = predict(setup.work, setup.baseline, device)
    found = list(shown.values())
    if all(row.strategy.mesh != baseline.strategy.mesh for row in found):
        found.append(baseline)
    return sorted(found, key=_rank)


def _rank(row: Prediction) -> tuple[bool, float]:
    return not row.fits_memory, -row.tokens_per_second


def bounds(setup: Setup, device: DeviceSpec) -> dict[str, float]:
    """Upper bounds of tokens/s from memory traffic, by its kind; the baseline's also with all-
    reduces.
    """

    def bound(strategy: Strategy) -> Prediction:
        return predict(setup.work, strategy, device)

    model, n = setup.model, setup.devices
    tensor, stages = setup.baseline.tensor, setup.baseline.stage
    baseline, all_reduces = bound(setup.baseline), ALL_REDUCES_PER_LAYER * model.layers
    summed = ring_all_reduce_bytes(
        setup.baseline.group_size(model.batch) * model.width * model.itemsize, tensor
    )
    linked = baseline.lower_bound_seconds + all_reduces * (
        ALL_REDUCE_SECONDS + summed / device.link_bandwidth
    )
    with_links = (
        f"the same, with {all_reduces} all-reduces of {1e6 * ALL_REDUCE_SECONDS:.0f} us and "
        "their bytes"
    )
    ring, unfilled = (Strategy(LAYER_WISE.strategy, stage=n, groups=groups) for groups in (n, 1))
    return {
        "weights and caches read once a step": ideal_per_second(setup.work, device, n),
        f"TP={tensor} x PP={stages}, {stages} groups": baseline.lower_bound_per_second,
        with_links: model.batch / linked,
        f"layer-wise, {n} groups of {model.batch // n}": bound(ring).lower_bound_per_second,
        "layer-wise, one group at a time": bound(unfilled).lower_bound_per_second,
    }


def bounds_grid(setup: Setup, devices: Sequence[DeviceSpec]) -> Grid:
    """One row per bound, one column per device."""
    found = [bounds(setup, device) for device in devices]
    rows = [[name, *(count(each[name]) for each in found)] for name in found[0]]
    columns = [
        "tokens/s at the most, by memory traffic",
        *(f"{setup.devices} x {device.name}" for device in devices),
    ]
    return Grid("", columns, rows)


def shape_text(strategy: Strategy) -> str:
    """Replicas, stages and tensor ways that exceed one, such as PP=2 x TP=8."""
    parts = {"DP": strategy.data, "PP": strategy.stage, "TP": strategy.tensor}
    return " x ".join(f"{name}={ways}" for name, ways in parts.items() if ways > 1) or "1"


def predictions_grid(setup: Setup, device: DeviceSpec, compiled: Mapping[str, Any]) -> Grid:
    """The paper's rows, the bounds, and predictions for every strategy on one kind of device.

    Args:
      setup: the experiment.
      device: what it runs on.
      compiled: bytes that a device holds, by strategy and shape, where the program was compiled.
    """
    columns = [
        "strategy",
        "shape",
        "paper, tokens/s",
        "1/TPS, ms",
        "between two tokens, ms",
        "bound, tokens/s",
    ]
    columns += [
        "predicted, tokens/s",
        "between two tokens, ms",
        "bound by",
        "GB a device: predicted",
        "compiled",
    ]
    rows = []
    for row in rows_to_show(setup, device):
        name, shape = row.strategy.name, shape_text(row.strategy)
        claim = (
            CLAIMS.get(name)
            if name != BASELINE.strategy or row.strategy.mesh == setup.baseline.mesh
            else None
        )
        said = ["", "", ""]
        if claim:
            waits = claim.inter_token_latency(setup.model.batch)
            said = [
                count(claim.tokens_per_second),
                milliseconds(claim.seconds_per_token),
                f"{1e3 * waits:.2f}",
            ]
        held = compiled.get(f"{name}, {shape}")
        rows.append(
            [
                name,
                shape,
                *said,
                count(row.lower_bound_per_second),
                count(row.tokens_per_second)
                if row.fits_memory
                else f"({count(row.tokens_per_second)}) does not fit",
                f"{1e3 * row.inter_token_latency:.2f}",
                row.bound_by,
                gigabytes(row.bytes_per_device),
                gigabytes(held["bytes_per_device"]) if held else "",
            ]
        )
    return Grid(f"{setup.devices} x {device.name}", columns, rows)
