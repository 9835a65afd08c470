"""The headline experiment's page: bounds to the digit, tables and pictures from results, targets
told as they are.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from experiments.command import Output
from experiments.dense16.advice import advice_grid
from experiments.dense16.errors import stock_points, with_predictions
from experiments.dense16.measured import ratio, residency_grid, stage_grid
from experiments.dense16.model import PRESETS
from experiments.dense16.paper import BASELINE, DEVICES, LAYER_WISE
from experiments.dense16.predictions import Setup, bounds, cache_verdict, predictions_grid
from experiments.dense16.report import report
from experiments.dense16.runs import load_runs
from experiments.dense16.scaling import Scaling, cases, longest_context, shapes
from experiments.dense16.targets import targets_grid
from experiments.grid import Grid
from experiments.page import update_page
from layerwise_jax.cost.devices import H100, H200
from layerwise_jax.simulate.predictor import Strategy
from layerwise_jax.simulate.records import PREDICTED_KINDS
from tests.support.paths import ROOT

PAPER = Setup(PRESETS["paper"], DEVICES)
SMALL = {"layers": 4, "heads": 8, "mlp": 4096, "dtype": "bfloat16", "head_dim": 128}


def record(strategy: str, seconds: float, kind: str = "decode", **more: Any) -> dict[str, Any]:
    mesh = {
        "one device": {},
        "replicas": {"data": 2},
        "tensor": {"tensor": 2},
        "layer-wise": {"stage": 2},
    }[strategy]
    return {
        "kind": kind,
        "strategy": strategy,
        "mesh": {"data": 1, "stage": 1, "tensor": 1, **mesh},
        "model": SMALL,
        "batch": 128,
        "context": 128,
        "steps": 144,
        "seconds_per_step": seconds,
        "spread": [0.9 * seconds, 1.1 * seconds],
        "tokens_per_second": 128 / seconds,
        "inter_token_latency": seconds,
        "seconds_per_token": seconds / 128,
        "bytes_per_device": 10**8,
        "compile_seconds": 3.0,
        "tokens_digest": "abcdef",
        "predicted": None,
        **more,
    }


def document(*records: dict[str, Any]) -> dict[str, Any]:
    return {
        "machine": {"gpus": ["NVIDIA H200"] * 2, "count": 2, "cpu": "32 CPU cores"},
        "versions": {"jax": "0.11.2"},
        "date": "2026-11-23",
        "command": "python -m experiments.dense16 --measure=all",
        "records": list(records),
        "failures": [],
    }


def counters(**about: Any) -> dict[str, Any]:
    """Record of DRAM reads of the stage that `measured` has times of."""
    held = {"stage_weight_bytes": 33e6, "group_cache_bytes": 4e6, "groups": 2}
    return {"kind": "counters", "model": SMALL, "batch": 8, "context": 128, **held, **about}


def measured() -> dict[str, Any]:
    stage = {"floor_seconds": 372e-6, "floor_share": 372 / 400, "batch": 8}
    overhead = {"tick_seconds": 150e-6, "stage_seconds": 140e-6, "overhead_seconds": 10e-6}
    weights = {"stage_weight_bytes": 33e6, "batch": 8}
    return document(
        record("one device", 295e-6),
        record("tensor", 400e-6),
        record("layer-wise", 500e-6),
        record("layer-wise", 250e-6),
        record("one device", 400e-6, "stage", **stage),
        record("layer-wise", 140e-6, "overhead", **overhead),
        record("one device", 10e-6, "residency", weights="resident", **weights),
        record("one device", 13e-6, "residency", weights="streaming", **weights),
        counters(weights="resident", dram_bytes_per_tick=3.3e6),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "h200x2.json").write_text(json.dumps(with_predictions(measured())))
    return tmp_path


def test_the_layers_need_the_tensor_ways_that_the_capacity_law_says() -> None:
    verdict = cache_verdict(PAPER, H100)
    assert verdict.largest_layer_bytes == 402_653_184
    assert verdict.tensor_ways == {16: 11, 8: 6, 4: 3}
    assert not verdict.is_resident


def test_bounds_are_those_of_memory_traffic() -> None:
    assert [round(rate) for rate in bounds(PAPER, H100).values()] == [
        20_062,
        19_691,
        17_763,
        15_642,
        1_254,
    ]
    assert [round(rate) for rate in bounds(PAPER, H200).values()] == [
        28_745,
        28_213,
        24_418,
        22_412,
        1_797,
    ]


def test_the_papers_seconds_a_token_are_no_latency() -> None:
    for claim, latency in ((BASELINE, 10.0e-3), (LAYER_WISE, 8.33e-3)):
        assert claim.seconds_per_token == pytest.approx(1 / claim.tokens_per_second, rel=0.01)
        assert claim.inter_token_latency() == pytest.approx(latency, rel=1e-3)


def results_in(folder: Path) -> dict[str, Path]:
    return Output(folder, folder, folder / "README.md").results()


def test_predictions_stand_beside_the_papers_rows_and_compiled_sizes() -> None:
    grid = predictions_grid(PAPER, H100, {"layer-wise, PP=16": {"bytes_per_device": 21.4e9}})
    rows = {(row[0], row[1]): row for row in grid.rows}
    assert rows["tensor x pipeline", "PP=2 x TP=8"][2:5] == ["12,800", "0.078", "10.00"]
    assert rows["layer-wise", "PP=16"][2:5] == ["15,360", "0.065", "8.33"]
    assert rows["layer-wise", "PP=16"][-1] == "21.4"
    assert "does not fit" in rows["one device", "1"][6]


def test_every_phase_and_model_has_an_advice_for_every_link() -> None:
    grid = advice_grid()
    assert [row[0] for row in grid.rows] == ["decode"] * 3 + ["prefill"] * 3 + ["training"] * 3
    assert all(len(row) == len(grid.columns) and all(row) for row in grid.rows)


def test_the_page_is_filled_from_results(folder: Path) -> None:
    page = folder / "README.md"
    page.write_text((ROOT / "experiments" / "dense16" / "README.md").read_text())
    assert report(Output(folder, folder, page)) == ["h200x2"]
    text = page.read_text()
    assert "19,691" in text
    assert "**512,000**" in text  # the fastest of the strategies, layer-wise in its better run
    assert "`python -m experiments.dense16 --measure=all`" in text
    for name in ("paper", "ring", "memory", "measured", "errors"):
        assert f"results/{name}.png" in text
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not (folder / "ratios.png").exists()


def test_targets_are_reached_or_missed_by_the_measurements(folder: Path) -> None:
    grid = targets_grid(load_runs(results_in(folder)))
    assert grid is not None
    found = {row[0]: row[1:] for row in grid.rows}
    ring, stage, errors, overhead = found.values()
    assert ring[0].startswith("1.60")
    assert ring[1] == stage[1] == overhead[1] == "reached"
    assert stage[0] == "93.0%"
    assert errors[0].endswith("of 5")
    assert overhead[0] == "10.0 to 10.0 us over its layers alone"


def test_slow_rings_and_stages_miss_their_targets(tmp_path: Path) -> None:
    slow = document(
        record("tensor", 400e-6),
        record("layer-wise", 300e-6),
        record("one device", 500e-6, "stage", floor_seconds=372e-6, floor_share=0.744, batch=8),
    )
    (tmp_path / "slow.json").write_text(json.dumps(slow))
    grid = targets_grid(load_runs(results_in(tmp_path)))
    assert grid is not None
    assert [row[2] for row in grid.rows][:2] == ["missed", "missed"]


def test_a_ratio_takes_each_strategy_in_its_best_shape() -> None:
    records = [record("layer-wise", 500e-6), record("layer-wise", 250e-6), record("tensor", 400e-6)]
    assert ratio(records, "layer-wise", "tensor") == pytest.approx(1.6)
    assert ratio(records, "layer-wise", "tensor x pipeline") is None


def test_residency_puts_times_and_counters_of_one_stage_into_one_row(folder: Path) -> None:
    grid = residency_grid(load_runs(results_in(folder)))
    assert grid is not None
    assert [list(row) for row in grid.rows] == [
        ["33.0", "8", "128", "8.0", "10.0", "13.0", "1.30", "3.3", "-"]
    ]


def test_a_stages_row_says_what_share_it_reads_from_dram(folder: Path) -> None:
    grid = stage_grid(load_runs(results_in(folder)))
    assert grid is not None
    assert [row[-1] for row in grid.rows] == ["8.9%"]


def test_records_get_predictions_and_errors_have_their_sign(folder: Path) -> None:
    (run,) = load_runs(results_in(folder))
    predicted = [found for found in run.records if found["kind"] in PREDICTED_KINDS]
    assert len(predicted) == 5
    for point, found in zip(stock_points(run), predicted, strict=True):
        assert found["predicted"]["tokens_per_second"] == pytest.approx(point.predicted)
        assert point.error == pytest.approx(
            found["seconds_per_step"] / found["predicted"]["seconds_per_step"] - 1
        )


def test_other_kinds_of_device_have_no_prediction() -> None:
    unknown = {**measured(), "machine": {"gpus": [], "count": 2, "cpu": ""}}
    assert all(found["predicted"] is None for found in with_predictions(unknown)["records"])


def test_all_shapes_of_tensor_parallelism_and_stages_are_measured() -> None:
    model = dataclasses.replace(PRESETS["exact"], layers=8, batch=128)
    found = [(shape.name, shape.stage, shape.tensor) for shape in shapes(model, 8)]
    assert found == [
        ("one device", 1, 1),
        ("replicas", 1, 1),
        ("tensor", 1, 8),
        ("tensor x pipeline", 2, 4),
        ("layer-wise + tensor", 4, 2),
        ("layer-wise", 8, 1),
    ]
    assert all(shape.num_devices in (1, 8) for shape in shapes(model, 8))


def test_the_longest_context_fits_and_a_longer_one_does_not() -> None:
    model = dataclasses.replace(PRESETS["exact"], layers=8, batch=128)
    assert longest_context(model, Strategy("layer-wise", stage=8), 100e9) == 10_000
    alone = longest_context(model, Strategy("one device"), 100e9)
    held = 8 * (model.layer_bytes + 128 * 2 * 4096 * 2 * alone)
    assert held <= 100e9 < held + 8 * 64 * 128 * 2 * 4096 * 2
    assert longest_context(model, Strategy("one device"), 1e9) == 0


def test_one_device_is_compared_where_it_fits() -> None:
    model = dataclasses.replace(PRESETS["exact"], batch=128)
    scaling = Scaling((model,), 8, (8, 16), ("one device", "tensor", "layer-wise"), 1.0, 1, 1)
    found = [
        (case.layers, case.context == 10_000, len(wanted)) for case, wanted in cases(scaling, 100e9)
    ]
    assert found == [(8, True, 2), (8, False, 3), (16, True, 2), (16, False, 3)]


def test_a_page_without_marks_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("nothing here\n")
    with pytest.raises(ValueError, match="must have the marks '<!-- bounds -->'"):
        update_page(page, {"bounds": Grid("", ["a"], [["b"]]).markdown()})
