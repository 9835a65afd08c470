"""Comparison of all strategies for one step: predictions, measurements beside them, advice."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from layerwise_jax._arguments import checked_int
from layerwise_jax._tables import plural, render, seconds_text, wrapped
from layerwise_jax.cost.capacity import CapacityBound, capacity_bound
from layerwise_jax.cost.device import DeviceSpec
from layerwise_jax.cost.layer_cost import LayerCost
from layerwise_jax.render.bars import Bar, Bars, Segment
from layerwise_jax.render.html import bars_html, text_html
from layerwise_jax.render.plots import plot_bars
from layerwise_jax.simulate.advice import advise, rate_unit, shape_text
from layerwise_jax.simulate.calibration import STOCK, Calibration
from layerwise_jax.simulate.predictor import (
    Prediction,
    Strategy,
    best_strategies,
    dense_decode,
    ideal_per_second,
    predict,
)
from layerwise_jax.simulate.records import Measurement, measurements
from layerwise_jax.simulate.work import StepWork

COMPARISON_VERSION = 1


@dataclass(frozen=True)
class Comparison:
    """Predictions of one step under every strategy.

    Attributes:
      work: the step.
      device: kind of device.
      num_devices: number of devices.
      calibration: efficiency factors of the predictions.
      rows: one prediction for each strategy, the fastest first, those that exceed memory last.
      alone: the same for a batch of one example, the lowest latency; empty for training.
      measured: for each row, its measurement or None.
    """

    work: StepWork
    device: DeviceSpec
    num_devices: int
    calibration: Calibration
    rows: tuple[Prediction, ...]
    alone: tuple[Prediction, ...]
    measured: tuple[Measurement | None, ...]

    @property
    def best_throughput(self) -> Prediction:
        """The row with the most examples a second that fits memory (of all, if none fits)."""
        return _first(self.rows)

    @property
    def best_latency(self) -> Prediction:
        """The row with the shortest step for a single example; for training, of the whole batch."""
        return _first(self.alone or self.rows)

    @property
    def advice(self) -> str:
        """Sentences on the fastest strategy, layer-wise compared with others, and residency."""
        return advise(self.rows, self.best_latency if self.alone else None)

    @property
    def verdict(self) -> CapacityBound:
        """Capacity law of these layers on these devices."""
        costs = [
            LayerCost(layer.name, math.ceil(layer.weight_bytes), 0, 0) for layer in self.work.layers
        ]
        return capacity_bound(
            costs, self.device, self.num_devices, bits=8 * self.work.weight_item_bytes
        )

    @property
    def ideal_per_second(self) -> float:
        """Tokens a second if a step took just one read of weights and caches from memory."""
        return ideal_per_second(self.work, self.device, self.num_devices)

    def row(self, name: str | None = None, **mesh: int) -> Prediction:
        """The fastest row with a strategy's name, a mesh (`stage=2, tensor=8`), or both.

        Raises:
          ValueError: no row matches.
        """
        found = [
            row
            for row in self.rows
            if name in (None, row.strategy.name)
            and all(row.strategy.mesh.get(a) == n for a, n in mesh.items())
        ]
        if not found:
            known = ", ".join(shape_text(row) for row in self.rows)
            raise ValueError(
                f"name and mesh must be those of a row ({known}), got {name!r} with the mesh "
                f"{mesh}."
            )
        return found[0]

    def with_rows(self, *strategies: Strategy) -> Comparison:
        """A copy with rows for further strategies, on any number of devices."""
        more = [
            predict(self.work, strategy, self.device, self.calibration) for strategy in strategies
        ]
        return _sorted(
            self, [*zip(self.rows, self.measured, strict=True), *((row, None) for row in more)]
        )

    def beside(self, records: Iterable[Mapping[str, Any]]) -> Comparison:
        """A copy with the measurements of the same step on the same meshes.

        Args:
          records: measurements, see the module `records`. The last one of a row counts.
        """
        found = [each for each in measurements(records) if _is_same_work(each.work, self.work)]
        measured = [
            next(
                (
                    each
                    for each in reversed(found)
                    if _is_same_strategy(each.strategy, row, self.work)
                ),
                old,
            )
            for row, old in zip(self.rows, self.measured, strict=True)
        ]
        return dataclasses.replace(self, measured=tuple(measured))

    def to_json(self) -> str:
        """All figures as JSON text."""
        rows: list[dict[str, Any]] = []
        for row, measured in zip(self.rows, self.measured, strict=True):
            figures = row.to_dict()
            if measured:
                figures |= {"measured_step_seconds": measured.seconds, "error": measured.error(row)}
            rows.append(figures)
        document = {
            "version": COMPARISON_VERSION,
            "device": self.device.name,
            "num_devices": self.num_devices,
            "work": dataclasses.asdict(self.work),
            "calibration": dataclasses.asdict(self.calibration),
            "ideal_per_second": self.ideal_per_second,
            "rows": rows,
            "best_throughput": self.best_throughput.to_dict(),
            "best_latency": self.best_latency.to_dict(),
            "advice": self.advice,
        }
        return json.dumps(document, indent=1)

    def _repr_html_(self) -> str:
        return text_html(_header(self)) + bars_html(self.bars) + text_html([self.advice])

    def plot(self) -> Any:
        """A matplotlib figure: seconds of a step by bottleneck, one bar a strategy."""
        return plot_bars(self.bars, _header(self)[0])

    @property
    def bars(self) -> Bars:
        """Seconds of a step by bottleneck, one bar a strategy that fits memory."""
        rows = [row for row in self.rows if row.fits_memory] or list(self.rows)
        return Bars([_bar(row) for row in rows], seconds_text)

    def __str__(self) -> str:
        rows = render(_table(self)).rstrip()
        return "\n".join([*wrapped(_header(self)), rows, *wrapped(_footer(self))]) + "\n"


def compare_work(
    work: StepWork, device: DeviceSpec, num_devices: int, calibration: Calibration = STOCK
) -> Comparison:
    """Predicts a step for every (data, stage, tensor) mesh of `num_devices`, and for one device.

    Args:
      work: the step.
      device: kind of device.
      num_devices: number of devices, with equal links between them.
      calibration: efficiency factors; `fit_calibration` makes them from measurements.

    Raises:
      ValueError: num_devices is no int of at least 1.
    """
    num_devices = checked_int("num_devices", num_devices)
    rows = best_strategies(work, num_devices, device, calibration)
    alone = []
    if work.kind != "training":
        alone = best_strategies(
            dataclasses.replace(work, batch=1), num_devices, device, calibration
        )
    found = Comparison(work, device, num_devices, calibration, (), _ranked(alone), ())
    return _sorted(found, [(row, None) for row in rows])


def compare_dense(
    device: DeviceSpec, num_devices: int, calibration: Calibration = STOCK, **model: Any
) -> Comparison:
    """`compare_work` for token generation by a dense network; `model` is as in `dense_decode`."""
    return compare_work(dense_decode(**model), device, num_devices, calibration)


def _bar(row: Prediction) -> Bar:
    parts = dataclasses.asdict(row.seconds_by_part)
    segments = tuple(Segment(name, seconds) for name, seconds in parts.items())
    rate = f"{row.tokens_per_second:,.0f} {rate_unit(row.work)}"
    return Bar(shape_text(row), segments, f"{rate}; {row.bytes_per_device / 1e9:.3g} GB a device")


def _rank(row: Prediction) -> tuple[bool, float, int]:
    """Sort key: rows that fit memory first, then by step time, then by number of devices."""
    return not row.fits_memory, row.step_seconds, row.strategy.num_devices


def _ranked(rows: Iterable[Prediction]) -> tuple[Prediction, ...]:
    return tuple(sorted(rows, key=_rank))


def _first(rows: Sequence[Prediction]) -> Prediction:
    return min(rows, key=_rank)


def _sorted(
    comparison: Comparison, pairs: list[tuple[Prediction, Measurement | None]]
) -> Comparison:
    rows, measured = zip(*sorted(pairs, key=lambda pair: _rank(pair[0])), strict=True)
    return dataclasses.replace(comparison, rows=rows, measured=measured)


def _is_same_work(one: StepWork, other: StepWork) -> bool:
    """True for equal kind, batch, number of layers and bytes; names and dtypes may differ."""
    if (one.kind, one.batch, len(one.layers)) != (other.kind, other.batch, len(other.layers)):
        return False
    return math.isclose(one.read_bytes, other.read_bytes) and math.isclose(
        one.state_bytes, other.state_bytes
    )


def _is_same_strategy(strategy: Strategy, row: Prediction, work: StepWork) -> bool:
    same_groups = strategy.num_groups(work.batch) == row.strategy.num_groups(work.batch)
    return strategy.mesh == row.strategy.mesh and same_groups


def _table(comparison: Comparison) -> Table:
    """A row for each strategy; measurements take the place of memory and links."""
    has_measured = any(comparison.measured)
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("strategy", overflow="fold")
    table.add_column("d x s x t", no_wrap=True)
    names = ["measured", "error"] if has_measured else ["of bound", "GB", "MB"]
    for name in ("step", rate_unit(comparison.work), *names):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("bound by", no_wrap=True)
    for row, measured in zip(comparison.rows, comparison.measured, strict=True):
        figures = _beside(row, measured) if has_measured else _bytes(row)
        table.add_row(*_cells(row), *figures, row.bound_by)
    return table


def _cells(row: Prediction) -> list[str]:
    """Name, mesh with the groups of a pipeline, step and rate."""
    mesh = "x".join(str(size) for size in row.strategy.mesh.values())
    groups = f"/{row.num_groups}" if row.strategy.stage > 1 else ""
    rate = f"{row.tokens_per_second:,.0f}"
    return [row.strategy.name, mesh + groups, seconds_text(row.step_seconds), rate]


def _bytes(row: Prediction) -> list[str]:
    """Share of the bound, bytes of the fullest device with its marks, bytes sent."""
    sent = row.link_bytes / 1e6
    marks = f"{'*' if row.is_resident else ''}{'' if row.fits_memory else '!'}"
    return [
        f"{row.tokens_per_second / row.lower_bound_per_second:.0%}",
        f"{row.bytes_per_device / 1e9:.3g}{marks}",
        f"{sent:,.0f}" if sent >= 100 else f"{sent:.3g}",
    ]


def _beside(row: Prediction, measured: Measurement | None) -> list[str]:
    if measured is None:
        return ["", ""]
    return [f"{measured.tokens_per_second:,.0f}", f"{measured.error(row):+.1%}"]


def _header(comparison: Comparison) -> list[str]:
    work = comparison.work
    layers = f"{len(work.layers)} {plural(len(work.layers), 'layer')}"
    devices = f"{comparison.num_devices} x {comparison.device.name}"
    ideal = f"{comparison.ideal_per_second:,.0f} {rate_unit(work)}"
    return [f"{work.kind} of {layers}, batch {work.batch}, on {devices}; ideally {ideal}"]


def _footer(comparison: Comparison) -> list[str]:
    columns = (
        "measured: the measured rate; error: predicted / measured rate - 1."
        if any(comparison.measured)
        else "of bound: share of the rate that arithmetic and reads of weights and caches allow. "
        "GB: on the fullest device; *: its weights stay in the cache; !: more than its memory. "
        "MB: sent over all links in a step."
    )
    return [
        f"d x s x t: replicas (data), stages, tensor ways; /: groups in flight. {columns}",
        comparison.advice,
        str(comparison.verdict),
        f"Constants: {comparison.calibration.source}.",
    ]
