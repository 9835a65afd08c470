"""experiments/dense16: every strategy generates one device's tokens; records of measurements."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.profiler import ProfileData
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from experiments.dense16.cases import (
    StageCase,
    counter_cases,
    residency_cases,
    stage_cases,
    toy_model,
)
from experiments.dense16.counters import METRIC, dram_bytes_read, samples
from experiments.dense16.measure import Session, Settings, run
from experiments.dense16.model import PRESETS, Dense, random_array
from experiments.dense16.stage import StageLoop
from experiments.dense16.strategies import MAKERS, fitting, make_strategy
from experiments.dense16.strategy import Strategy
from experiments.dense16.timing import DecodeRun, compile_all, digest, time_in_turns

STEPS = 5
ROOT = Path(__file__).parents[2]
TINY = replace(PRESETS["tiny"], batch=8, context=12)


def start(model: Dense) -> tuple[Any, Any, np.ndarray, np.ndarray]:
    """Parameters, a cache with something in it, first tokens, and positions that differ."""
    here = SingleDeviceSharding(jax.devices()[0])
    params, cache = (
        model.params(random_array(model, 0, here)),
        model.cache(model.batch, random_array(model, 1, here)),
    )
    numbers = np.arange(model.batch, dtype=np.int32)
    return params, cache, numbers % model.vocabulary, numbers % 4 + 2


def generated(
    strategy: Strategy, params: Any, cache: Any, tokens: np.ndarray, positions: np.ndarray
) -> np.ndarray:
    _, made = strategy.run(strategy.place(params), strategy.start(cache, tokens, positions), STEPS)
    return made


@pytest.fixture(scope="module")
def alone() -> np.ndarray:
    return generated(make_strategy("one device", TINY, jax.devices()), *start(TINY))


def test_a_layer_has_the_papers_weights() -> None:
    paper = PRESETS["paper"]
    assert paper.layer_weights == 201_326_592
    assert paper.layer_weights == sum(math.prod(shape) for shape in paper.block_shapes().values())
    assert paper.batch * paper.sequence_bytes == 20_971_520_000


def test_one_device_is_the_plain_loop(alone: np.ndarray) -> None:
    params, cache, tokens, positions = start(TINY)
    step, made = jax.jit(TINY.step), []
    for _ in range(STEPS):
        logits, cache = step(params, cache, tokens, positions)
        tokens, positions = jnp.argmax(logits, axis=-1).astype(jnp.int32), positions + 1
        made.append(np.asarray(tokens))
    np.testing.assert_array_equal(alone, made)


def test_tokens_depend_on_the_cache(alone: np.ndarray) -> None:
    params, cache, tokens, positions = start(TINY)
    other = jax.tree.map(lambda x: -3 * x, cache)
    assert (
        generated(
            make_strategy("one device", TINY, jax.devices()), params, other, tokens, positions
        )
        != alone
    ).any()


@pytest.mark.parametrize(
    ("name", "ways"),
    [
        ("replicas", {"data": 8}),
        ("tensor", {"tensor": 4}),
        ("tensor x pipeline", {"stage": 2, "tensor": 4}),
        ("layer-wise", {"stage": 4}),
        ("layer-wise + tensor", {"stage": 4, "tensor": 2}),
    ],
)
def test_every_strategy_generates_one_devices_tokens(
    alone: np.ndarray, name: str, ways: dict[str, int]
) -> None:
    strategy = make_strategy(name, TINY, jax.devices(), **ways)
    params, cache, tokens, positions = start(TINY)
    weights, state = strategy.place(params), strategy.start(cache, tokens, positions)
    state, made = strategy.run(weights, state, STEPS)
    np.testing.assert_array_equal(made, alone)
    state, again = strategy.run(weights, strategy.rewind(state, tokens, positions), STEPS)
    np.testing.assert_array_equal(again, alone)


def test_what_fits_uses_all_devices() -> None:
    for count in (1, 2, 4, 8, 16):
        found = fitting(toy_model(count), count)
        assert found[0] == ("one device", {})
        assert all(math.prod(ways.values()) == count for _, ways in found[1:])
    assert dict(found)["tensor x pipeline"] == {"stage": 2, "tensor": 8}
    assert [name for name, _ in fitting(replace(TINY, layers=3, batch=5), 2)] == [
        "one device",
        "tensor",
    ]


@pytest.mark.parametrize(
    ("name", "ways", "reason"),
    [
        ("by hand", {}, "name must be one of"),
        ("layer-wise", {"stage": 3}, "must be multiples of the 3 stages"),
        ("tensor", {"tensor": 3}, "does not split"),
        ("tensor", {"tensor": 4, "stage": 8}, "needs data \\* stage \\* tensor = 32 devices"),
    ],
)
def test_what_does_not_split_is_refused(name: str, ways: dict[str, int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make_strategy(name, TINY, jax.devices(), **ways)


def test_random_arrays_do_not_depend_on_their_sharding() -> None:
    mesh = Mesh(np.array(jax.devices()[:4]), ("tensor",))
    shardings = SingleDeviceSharding(jax.devices()[0]), NamedSharding(mesh, PartitionSpec("tensor"))
    one, split = (random_array(TINY, 3, sharding)((8, 6), 0.5, 7) for sharding in shardings)
    np.testing.assert_array_equal(one, split)
    assert len(split.addressable_shards) == 4
    assert 0.4 < float(random_array(TINY, 3, one.sharding)((64, 64), 0.5, 1).std()) < 0.6


def test_a_stage_updates_every_groups_cache_in_place() -> None:
    model = replace(TINY, layers=1, batch=2)
    loop = StageLoop(model, jax.devices()[0], groups=2, copies=2, ticks=4, rounds=2, has_ends=True)
    sizes = loop.program.memory_analysis()
    state = loop.start()
    before = [np.asarray(cache[0]["k"]) for cache in state.caches]
    first, ticks = int(state.positions[0][0]), loop.ticks_of_program // 2
    after = loop.program(loop.weights(), state)
    for g, old in enumerate(before):
        changed = np.flatnonzero((np.asarray(after.caches[g][0]["k"]) != old).any(axis=(0, 2, 3)))
        np.testing.assert_array_equal(changed, np.arange(first, first + ticks))
    assert sizes.alias_size_in_bytes >= 2 * model.batch * model.sequence_bytes
    assert first + ticks == model.context


def test_cases_of_residency_differ_in_copies_alone() -> None:
    for resident, streaming in residency_cases("gpu"):
        assert replace(streaming, copies=1) == resident
        assert streaming.copies * streaming.model.layer_bytes >= 256 * 2**20
    assert [case.model.batch for case in stage_cases("gpu")] == [8, 16, 32, 128]
    assert all(isinstance(case, StageCase) for case in stage_cases("toy"))


class Clockwork:
    """A run whose time is known: a start of 7 seconds, 3 seconds a unit."""

    counts = (2, 10)
    steps_a_unit = 4

    def __init__(self, breaks_at: int | None = None):
        self.turns, self.breaks_at = 0, breaks_at

    def compile(self) -> Any:
        return jax.jit(lambda x: x + 1).lower(1.0).compile()

    def prepare(self) -> None:
        self.turns = 0

    def seconds(self, count: int) -> float:
        self.turns += 1
        if self.turns == self.breaks_at:
            raise RuntimeError("it broke")
        return 7.0 + 3.0 * count


def test_a_steps_time_is_a_difference_and_failures_are_told_apart() -> None:
    told: list[tuple[str, str]] = []

    def failed(name: str, error: Exception) -> None:
        told.append((name, str(error)))

    runs = {"good": Clockwork(), "bad": Clockwork(breaks_at=5)}
    assert set(compile_all(runs, failed, threads=2)) == {"good", "bad"}
    (timing,) = time_in_turns(runs, 3, failed).values()
    assert told == [("bad", "it broke")]
    assert timing.repeats == (0.75,) * 3
    assert timing.plain == 37.0 / 40
    assert timing.record()["spread"] == [0.75, 0.75]


def test_a_run_starts_over_each_time() -> None:
    model = replace(TINY, layers=2)
    params, cache, *_ = start(model)
    each = DecodeRun(
        make_strategy("one device", model, jax.devices()), lambda: params, lambda: cache, (0, STEPS)
    )
    each.compile()
    each.prepare()
    found = set()
    for _ in range(2):
        assert each.seconds(0) == 0
        assert each.seconds(STEPS) > 0
        found.add(digest(each.tokens))
    assert len(found) == 1


def test_records_have_what_reports_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(TINY, layers=2, batch=4)
    monkeypatch.setattr("experiments.dense16.cases.toy_model", lambda count: small)
    settings = Settings("toy", ("decode", "stage"), repeats=1, devices=2, threads=2)
    told: list[str] = []
    document = run(settings, tmp_path / "toy.json", told.append)
    assert json.loads((tmp_path / "toy.json").read_text()) == document
    assert document["failures"] == []
    decode = [r for r in document["records"] if r["kind"] == "decode"]
    assert [r["strategy"] for r in decode] == ["one device", "replicas", "tensor", "layer-wise"]
    assert {r["same_tokens"] for r in decode} == {1.0}
    assert {r["tokens_digest"] for r in decode} == {decode[0]["tokens_digest"]}
    for record in decode:
        assert record["tokens_per_second"] == pytest.approx(
            record["batch"] / record["seconds_per_step"]
        )
        assert math.prod(record["mesh"].values()) in (1, 2)
        assert record["bytes_per_device"] > 0
    (overhead,) = (r for r in document["records"] if r["kind"] == "overhead")
    assert overhead["tick_seconds"] == pytest.approx(
        overhead["stage_seconds"] + overhead["overhead_seconds"]
    )
    (stage,) = (r for r in document["records"] if r["kind"] == "stage")
    assert stage["floor_share"] == pytest.approx(stage["floor_seconds"] / stage["seconds_per_step"])


def test_the_emulated_part_of_the_experiment(tmp_path: Path) -> None:
    """All strategies on sixteen devices, as its command runs them."""
    command = [
        sys.executable,
        "-m",
        "experiments.dense16",
        "--parts=emulate",
        "--threads=2",
        f"--out={tmp_path}",
    ]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    records = json.loads((tmp_path / "emulated.json").read_text())["records"]
    assert [record["strategy"] for record in records] == list(MAKERS)
    assert {record["same_tokens"] for record in records} == {1.0}


def test_what_time_is_too_short_for_and_what_fails_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = run(Settings("toy", ("stage",), seconds=0), tmp_path / "late.json")
    assert "the time was up" in late["failures"][0]["error"]
    assert not late["records"]

    def broken(*_: Any) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(Session, "_timed", broken)
    document = run(Settings("toy", ("stage", "residency")), tmp_path / "broken.json")
    assert [(f["part"], f["error"]) for f in document["failures"]] == [
        ("stage", "RuntimeError: no such luck"),
        ("residency", "RuntimeError: no such luck"),
    ]


def test_counters_are_those_of_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be a GPU, .* got cpu:0"):
        dram_bytes_read(jax.devices()[0], lambda: None)
    document = run(Settings("toy", ("counters",)), tmp_path / "counters.json")
    assert len(document["failures"]) == len(counter_cases("toy"))
    assert not document["records"]


# An error raised where nanobind makes a type would end the process.
@pytest.mark.filterwarnings("ignore:builtin type:DeprecationWarning")
def test_the_samples_of_one_gpu_are_read_from_a_profile() -> None:
    profile = profile_of({"/device:GPU:0": [96.0, float("nan"), 1_033.5e6], "/device:GPU:1": [7.0]})
    assert samples(profile, 0) == [96.0, 1_033.5e6]
    assert samples(profile, 1) == [7.0]
    assert samples(profile, 2) == []


def profile_of(values: dict[str, list[float]]) -> Any:
    """A profile with samples, as the profiler writes them, and an event of another name."""
    planes = []
    for name, found in values.items():
        sampled = "".join(
            f"events {{ metadata_id: 1 stats {{ metadata_id: 1 double_value: {value} }} }}"
            for value in found
        )
        planes.append(
            f"""planes {{ name: "{name}"
            event_metadata {{ key: 1 value {{ id: 1 name: "{METRIC}" }} }}
            event_metadata {{ key: 2 value {{ id: 2 name: "gemm" }} }}
            stat_metadata {{ key: 1 value {{ id: 1 name: "{METRIC}" }} }}
            lines {{ name: "_counters_" {sampled} }}
            lines {{ name: "Stream #14(Compute)" events {{ metadata_id: 2 duration_ps: 5 }} }} }}"""
        )
    return ProfileData.from_text_proto("\n".join(planes))
