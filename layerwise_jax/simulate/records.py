"""Measurements in the form that experiments write, and predictions for them.

A record is a mapping with at least: `kind` ("decode": whole steps; "stage": passes of some layers
on one device), `strategy`, `mesh` (sizes of data, stage, tensor), `model` (layers, heads, mlp,
dtype), `batch`, `context`, and `seconds_per_step`. Optional are `groups`, the groups of sequences
in flight, and `head_dim` in the model, 128 by default. Records of other kinds are ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from layerwise_jax.cost.device import DeviceSpec
from layerwise_jax.simulate.calibration import STOCK, Calibration
from layerwise_jax.simulate.predictor import Prediction, StepWork, Strategy, dense_decode, predict

PREDICTED_KINDS = ("decode", "stage")
HEAD_DIM = 128


@dataclass(frozen=True)
class Measurement:
    """Measured seconds of a step under a strategy."""

    work: StepWork
    strategy: Strategy
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.work.batch * self.work.tokens / self.seconds

    def error(self, prediction: Prediction) -> float:
        """Predicted / measured tokens a second - 1."""
        return self.seconds / prediction.step_seconds - 1


def work_of(record: Mapping[str, Any]) -> StepWork:
    """The step of a record."""
    model = record["model"]
    return dense_decode(
        layers=model["layers"],
        heads=model["heads"],
        head_dim=model.get("head_dim", HEAD_DIM),
        mlp=model["mlp"],
        batch=record["batch"],
        context=record["context"],
        dtype=model["dtype"],
    )


def strategy_of_record(record: Mapping[str, Any]) -> Strategy:
    """The strategy of a record; "one device" for the kind "stage"."""
    if record["kind"] == "stage":
        return Strategy("one device")
    return Strategy(record["strategy"], **record["mesh"], groups=record.get("groups"))


def measurements(records: Iterable[Mapping[str, Any]]) -> list[Measurement]:
    """The measurements among the records: those with `seconds_per_step` of a known kind."""
    return [
        Measurement(work_of(record), strategy_of_record(record), record["seconds_per_step"])
        for record in records
        if record["kind"] in PREDICTED_KINDS and record.get("seconds_per_step")
    ]


def predict_record(
    record: Mapping[str, Any], device: DeviceSpec, calibration: Calibration = STOCK
) -> Prediction | None:
    """The prediction for a record's step; None for records of other kinds."""
    if record["kind"] not in PREDICTED_KINDS:
        return None
    return predict(work_of(record), strategy_of_record(record), device, calibration)
