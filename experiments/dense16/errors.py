"""Errors of the predictions, by strategy."""

from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

from experiments.dense16.runs import Record, Run
from experiments.grid import Grid, signed
from layerwise_jax.simulate import STOCK, Calibration, fit_calibration, measurements, predict_record

# What a prediction may be off, after calibration on the device.
TOLERANCE = 0.15
STAGE_ALONE = "one stage alone"


class Point(NamedTuple):
    """One measurement: name of the strategy, measured and predicted tokens/s."""

    name: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """Relative error: predicted over measured tokens/s, minus one."""
        return self.predicted / self.measured - 1


def stock_points(run: Run) -> list[Point]:
    """Points of a run with the package's own calibration."""
    return _points(run, STOCK)


def calibrated_points(run: Run) -> list[Point]:
    """Points of a run with a calibration fitted to this run."""
    if run.spec is None or not measurements(run.records):
        return []
    return _points(run, fit_calibration(run.records, run.spec))


def _points(run: Run, calibration: Calibration) -> list[Point]:
    if run.spec is None:
        return []
    found = []
    for record in run.records:
        prediction = predict_record(record, run.spec, calibration)
        if prediction is not None and record.get("seconds_per_step"):
            name = STAGE_ALONE if record["kind"] == "stage" else record["strategy"]
            found.append(
                Point(
                    name, record["batch"] / record["seconds_per_step"], prediction.tokens_per_second
                )
            )
    return found


def errors_grid(runs: Sequence[Run]) -> Grid | None:
    """One row per strategy: errors with the package's calibration, and fitted to each run."""
    stock = [point for run in runs for point in stock_points(run)]
    fitted = [point for run in runs for point in calibrated_points(run)]
    columns = ["strategy", "measurements", "as it comes: median error", "worst"]
    columns += ["calibrated on each run: median error", "worst", f"within {TOLERANCE:.0%}"]
    rows = []
    for name in dict.fromkeys(point.name for point in stock):
        before, after = (
            [point.error for point in points if point.name == name] for points in (stock, fitted)
        )
        within = sum(abs(error) <= TOLERANCE for error in after)
        rows.append(
            [name, str(len(before)), *_spread(before), *_spread(after), f"{within} of {len(after)}"]
        )
    return Grid("", columns, rows) if rows else None


def _spread(values: Sequence[float]) -> list[str]:
    return [f"{median(map(abs, values)):.1%}", signed(max(values, key=abs))]


def with_predictions(document: dict[str, Any]) -> dict[str, Any]:
    """The document with the prediction of the package's calibration in each record."""
    known = {key: document[key] for key in ("machine", "versions", "date", "command", "records")}
    return {**document, "records": predicted_records(Run("", **known))}


def predicted_records(run: Run) -> list[Record]:
    """Records of a run, each with the prediction of the package's calibration."""
    return [{**record, "predicted": _figures(record, run)} for record in run.records]


def _figures(record: Record, run: Run) -> dict[str, float] | None:
    found = predict_record(record, run.spec) if run.spec else None
    return found and {
        "tokens_per_second": found.tokens_per_second,
        "seconds_per_step": found.step_seconds,
    }
