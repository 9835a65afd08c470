"""Measurements as experiments write them, beside what is predicted for them.

A record is a mapping with, at least: `kind` ("decode": whole steps; "stage": passes of some layers
on one device), `strategy`, `mesh` (sizes of data, stage, tensor), `model` (layers, heads, mlp,
dtype), `batch`, `context`, and `seconds_per_step`. A `groups` says how many groups of sequences
were in flight, a `head_dim` in the model how wide a head is if not 128. Records of other kinds are
left out of everything here.
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
    """A measured step: of what work, under which strategy, and its seconds."""

    work: StepWork
    strategy: Strategy
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.work.batch * self.work.tokens / self.seconds

    def error(self, prediction: Prediction) -> float:
        """Predicted over measured tokens a second, less 1."""
        return self.seconds / prediction.step_seconds - 1


def work_of(record: Mapping[str, Any]) -> StepWork:
    """What was run."""
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
    """How it was spread; "one device" for a stage by itself."""
    if record["kind"] == "stage":
        return Strategy("one device")
    return Strategy(record["strategy"], **record["mesh"], groups=record.get("groups"))


def measurements(records: Iterable[Mapping[str, Any]]) -> list[Measurement]:
    """Those of the records that say how long a step took."""
    return [
        Measurement(work_of(record), strategy_of_record(record), record["seconds_per_step"])
        for record in records
        if record["kind"] in PREDICTED_KINDS and record.get("seconds_per_step")
    ]


def predict_record(
    record: Mapping[str, Any], device: DeviceSpec, calibration: Calibration = STOCK
) -> Prediction | None:
    """What is predicted for a record's step; None for a kind that nothing is predicted for."""
    if record["kind"] not in PREDICTED_KINDS:
        return None
    return predict(work_of(record), strategy_of_record(record), device, calibration)
