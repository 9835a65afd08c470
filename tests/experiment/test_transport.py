"""experiments/dense16: transports timed and compared, rehearsed on emulated devices."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.dense16.measure import Settings
from experiments.dense16.model import PRESETS
from experiments.dense16.transport import Trial, measure_rounds, measure_transport

TINY = replace(PRESETS["tiny"], layers=2, batch=4, context=12)
SETTINGS = Settings("toy", (), repeats=1, devices=2, threads=2)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("experiments.dense16.transport.toy_model", lambda count: TINY)
    return tmp_path / "toy.json"


@pytest.mark.slow
def test_times_are_told_by_transport(path: Path) -> None:
    document = measure_transport(SETTINGS, path, lambda text: None)
    assert document["failures"] == []
    assert json.loads(path.read_text()) == document
    decode = [r for r in document["records"] if r["kind"] == "decode"]
    assert [r["strategy"] for r in decode] == ["one device", "replicas", "tensor", "layer-wise"]
    assert {r["same_tokens"] for r in decode} == {1.0}
    assert decode[-1]["transport"] == "permute"
    assert decode[-1]["overhead_over_ends_seconds"] is not None
    messages = [r for r in document["records"] if r["kind"] == "message"]
    assert [r["messages_an_iteration"] for r in messages] == [1, 4]


@pytest.mark.slow
def test_rounds_are_compared_and_two_rings_run_at_once(path: Path) -> None:
    document = measure_rounds(SETTINGS, path, lambda text: None)
    assert document["failures"] == []
    exact = [r for r in document["records"] if r["kind"] == "exact"]
    assert [r["same_as_first"] for r in exact] == [True, True]
    (together,) = (r for r in document["records"] if r["kind"] == "together")
    assert together["same"]


def test_another_result_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([("a", "b"), ("a", "c")])
    monkeypatch.setattr(Trial, "_run", lambda *_: next(found))
    monkeypatch.setattr(Trial, "_ring", lambda *_: None)
    records = list(Trial(TINY, [None, None], 4).compare(["permute", "peer_store"]))
    assert [r["same_as_first"] for r in records] == [True, False]
    assert [r["tokens_digest"] for r in records] == ["a", "a"]
