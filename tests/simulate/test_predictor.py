"""Predictions in plain numbers: the bounds that are known, what was measured, and what must always
hold.
"""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise_jax.cost.devices import A100, B200, H100, H200, L40S
from layerwise_jax.simulate.calibration import Calibration
from layerwise_jax.simulate.fit import fit_calibration
from layerwise_jax.simulate.predictor import (
    STOCK,
    LayerWork,
    StepWork,
    Strategy,
    best_strategies,
    dense_decode,
    dense_prefill,
    ideal_per_second,
    predict,
)
from layerwise_jax.simulate.records import measurements, predict_record
from layerwise_jax.simulate.stage import ring_all_reduce_bytes
from layerwise_jax.simulate.strategy import shapes, strategy_of
from layerwise_jax.simulate.work import ALL_REDUCES_PER_LAYER

ONE = Strategy("one device")
TENSOR = Strategy("tensor", tensor=2)
LAYER_WISE = Strategy("layer-wise", stage=2)
BASELINE = Strategy("tensor x pipeline", stage=2, tensor=8)


def record(strategy, layers, heads, mlp, batch, context, tokens_per_second, kind="decode"):
    model = {"layers": layers, "heads": heads, "mlp": mlp, "dtype": "bfloat16"}
    seconds = batch / tokens_per_second
    return {
        "kind": kind,
        "strategy": strategy.name,
        "mesh": strategy.mesh,
        "model": model,
        "batch": batch,
    } | {
        "context": context,
        "seconds_per_step": seconds,
    }


def small(strategy, batch, tokens_per_second):
    return record(strategy, 4, 8, 4096, batch, 128, tokens_per_second)


def exact(strategy, tokens_per_second):
    return record(strategy, 4, 32, 16384, 32, 10_000, tokens_per_second)


def one_stage(batch, microseconds):
    return record(ONE, 1, 32, 16384, batch, 10_000, batch / microseconds * 1e6, kind="stage")


# Hand-written programs on H200s, driver 580, JAX 0.11.2.
MEASURED = [
    small(ONE, 32, 212e3),
    small(TENSOR, 32, 105e3),
    small(LAYER_WISE, 32, 147.5e3),
    small(ONE, 128, 434e3),
    small(TENSOR, 128, 320e3),
    small(LAYER_WISE, 128, 462e3),
    exact(ONE, 6_149),
    exact(TENSOR, 10_270),
    exact(LAYER_WISE, 10_203),
    one_stage(8, 450),
    one_stage(16, 753),
    one_stage(32, 1_348),
    one_stage(128, 4_816),
]


def errors(records, calibration):
    found = []
    for each in measurements(records):
        found.append(each.error(predict(each.work, each.strategy, H200, calibration)))
    return found


@pytest.mark.parametrize(
    ("device", "bounds"),
    [
        (H100, (20_062, 19_691, 17_763, 15_642, 1_254)),
        (H200, (28_745, 28_213, 24_418, 22_412, 1_797)),
    ],
)
def test_decode_bounds_of_the_16_layer_model(device, bounds):
    work = dense_decode()
    baseline = predict(work, BASELINE, device)
    # 64 sequences of 4096 numbers in 16 bits, over 8 ways, twice a layer of 8 layers for each of 2
    # groups.
    each = 20e-6 + ring_all_reduce_bytes(64 * 4096 * 2, 8) / device.link_bandwidth
    with_sums = 128 / (baseline.lower_bound_seconds + ALL_REDUCES_PER_LAYER * 8 * 2 * each)
    found = (
        ideal_per_second(work, device, 16),
        baseline.lower_bound_per_second,
        with_sums,
        predict(work, Strategy("layer-wise", stage=16), device).lower_bound_per_second,
        predict(work, Strategy("layer-wise", stage=16, groups=1), device).lower_bound_per_second,
    )
    assert tuple(round(rate) for rate in found) == bounds


def test_prefill_of_the_16_layer_model_wins_on_communication():
    work = dense_prefill()
    even = predict(work, Strategy("replicas", data=16), H100)
    assert even.lower_bound_seconds == pytest.approx(0.627, abs=5e-4)
    ring = predict(work, Strategy("layer-wise", stage=16, groups=128), H100)
    assert ring.lower_bound_seconds == pytest.approx(0.70, abs=5e-3)
    assert ring.num_ticks == 143
    # Busy ticks alone: a boundary passes on all of the batch once, 23 ms, and all-reduces would
    # take 652 ms.
    assert ring.seconds_by_part.links * 128 / 143 == pytest.approx(0.0233, abs=1e-4)
    split = predict(work, BASELINE, H100)
    assert split.seconds_by_part.links * (1 - split.bubble_share) == pytest.approx(
        0.652 + 0.0233, abs=1e-3
    )


def test_bytes_of_the_16_layer_model():
    ring = predict(dense_decode(), Strategy("layer-wise", stage=16), H100)
    assert ring.weight_bytes == 402_653_184
    assert ring.state_bytes == pytest.approx(20.97e9, rel=1e-3)
    assert ring.link_bytes == 15 * 128 * 4096 * 2
    assert ring.collectives == 16
    assert not ring.is_resident
    assert ring.fits_memory
    assert not predict(dense_decode(), ONE, H100).fits_memory


def test_times_have_names_of_their_own():
    found = predict(dense_decode(), Strategy("layer-wise", stage=16), H100)
    assert found.inter_token_latency == found.step_seconds
    assert found.inter_token_latency == pytest.approx(128 * found.seconds_per_token)


def test_uncalibrated_predictions_are_near_what_was_measured():
    assert max(abs(error) for error in errors(MEASURED, STOCK)) < 0.12


def test_a_fit_comes_within_8_percent_of_all_that_was_measured():
    fitted = fit_calibration(MEASURED, H200)
    found = errors(MEASURED, fitted)
    assert max(abs(error) for error in found) < 0.08
    assert sum(error**2 for error in found) < sum(error**2 for error in errors(MEASURED, STOCK))
    assert str(len(MEASURED)) in fitted.source


def test_a_fit_to_one_microbatch_of_a_stage_foretells_the_others():
    fitted = fit_calibration([one_stage(8, 450), one_stage(16, 753)], H200)
    assert (
        max(abs(error) for error in errors([one_stage(32, 1_348), one_stage(128, 4_816)], fitted))
        < 0.05
    )
    assert fitted.all_reduce_seconds == pytest.approx(STOCK.all_reduce_seconds)


def test_a_fit_finds_the_constants_that_made_the_measurements():
    truth = dataclasses.replace(
        STOCK, state_share=0.8, kernel_seconds=2.5e-6, all_reduce_seconds=12e-6
    )
    made = []
    for each in MEASURED:
        prediction = predict_record(each, H200, truth)
        assert prediction is not None
        made.append(each | {"seconds_per_step": prediction.step_seconds})
    fitted = fit_calibration(made, H200)
    assert max(abs(error) for error in errors(made, fitted)) < 0.03
    assert fitted.state_share == pytest.approx(0.8, rel=0.03)
    assert fitted.all_reduce_seconds == pytest.approx(12e-6, rel=0.2)


def test_a_fit_wants_measurements():
    with pytest.raises(ValueError, match="nothing to fit"):
        fit_calibration([{"kind": "overhead"}], H200)


def test_records_of_other_kinds_are_left_out():
    other = MEASURED[0] | {"kind": "residency"}
    assert predict_record(other, H200) is None
    assert len(measurements([other, MEASURED[0], MEASURED[1] | {"seconds_per_step": None}])) == 1


def test_calibration_goes_to_json_and_back():
    assert Calibration.from_json(STOCK.to_json()) == STOCK


@pytest.mark.parametrize("text", ["", "{}", "[]", "3", "null", '[1, "a"]'])
def test_other_text_is_no_calibration(text):
    with pytest.raises(ValueError, match=r"fields|JSON"):
        Calibration.from_json(text)


@pytest.mark.parametrize(
    "change", [{"weight_share": 1.2}, {"weight_share": 0}, {"tick_seconds": -1e-6}]
)
def test_a_calibration_refuses_what_cannot_be(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(STOCK, **change)


def test_refusals_say_what_is_wanted():
    with pytest.raises(ValueError, match="more replicas"):
        predict(dense_decode(layers=4), Strategy("layer-wise", stage=8), H100)
    with pytest.raises(ValueError, match="stage of 'layer-wise' must be at least 1"):
        Strategy("layer-wise", stage=0)
    with pytest.raises(ValueError, match="batch of 0"):
        dense_decode(batch=0)
    with pytest.raises(ValueError, match="flops of layer 'a' must be"):
        LayerWork("a", 1, -1, 1)
    with pytest.raises(ValueError, match="'float7'"):
        dense_decode(dtype="float7")


def test_weights_that_fit_are_read_from_the_cache_as_long_as_nothing_drives_them_out():
    few = dense_decode(layers=2, heads=8, mlp=4096, batch=16, context=128)
    alone, split = predict(few, ONE, H200), predict(few, LAYER_WISE, H200)
    assert not alone.is_resident
    assert split.is_resident
    assert split.seconds_by_part.cache > 0
    assert not predict(dataclasses.replace(few, batch=512), LAYER_WISE, H200).is_resident


def test_shapes_use_all_devices_and_leave_no_stage_empty():
    work = dense_decode(layers=4, heads=8, batch=2)
    found = shapes(work, 16)
    assert found[0] == (1, 1, 1)
    assert all(d * s * t == 16 and s <= 4 and 8 % t == 0 and d <= 2 for d, s, t in found[1:])
    assert (2, 4, 2) in found
    assert (1, 4, 4) in found


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        ((1, 1, 1), "one device"),
        ((4, 1, 1), "replicas"),
        ((1, 1, 4), "tensor"),
        ((1, 2, 8), "tensor x pipeline"),
        ((1, 4, 1), "layer-wise"),
        ((1, 8, 2), "layer-wise + tensor"),
        ((2, 4, 1), "replicas x layer-wise"),
    ],
)
def test_names_follow_from_shapes(shape, name):
    assert strategy_of(*shape).name == name


def test_training_takes_a_schedule_and_sums_the_gradients_of_replicas():
    layer = LayerWork("block", weight_bytes=1e8, flops=1e12, send_bytes=1e6, activation_bytes=1e6)
    work = StepWork((layer,) * 8, batch=32, kind="training", dtype="bfloat16")
    one, replicas = predict(work, ONE, H100), predict(work, Strategy("replicas", data=4), H100)
    piped = predict(work, Strategy("layer-wise", stage=4, groups=16), H100)
    forward = predict(dataclasses.replace(work, kind="forward"), ONE, H100)
    assert one.step_seconds == pytest.approx(4 * forward.step_seconds, rel=0.01)
    assert replicas.link_bytes == pytest.approx(4 * 2 * 3 / 4 * 2 * 8e8)
    assert one.weight_bytes == pytest.approx(3 * 8e8)
    assert piped.weight_bytes == pytest.approx(one.weight_bytes / 4)
    assert one.step_seconds / 4 < piped.step_seconds < one.step_seconds / 2


def test_unlike_layers_are_cut_where_the_slowest_stage_is_fastest():
    light, heavy = (LayerWork(str(n), n * 1e9, 1e9, 1e4) for n in (1, 5))
    work = StepWork((light, light, light, light, heavy), 8, "decode", "bfloat16")
    assert predict(work, LAYER_WISE, H100).weight_bytes == 5e9


def test_rows_of_an_embedding_are_looked_up_not_read():
    table = LayerWork("embed", 1e9, 0, 1e4, lookup_bytes=1e9)
    block = LayerWork("block", 1e8, 1e8, 1e4)
    with_table, without = (
        StepWork(layers, 8, "decode", "bfloat16") for layers in ((table, block), (block, block))
    )
    assert (
        predict(with_table, ONE, H100).seconds_by_part.memory
        < predict(without, ONE, H100).seconds_by_part.memory
    )
    assert predict(with_table, ONE, H100).weight_bytes == 1.1e9


def test_kernels_and_sums_of_a_layer_can_be_told():
    block = LayerWork("block", 1e6, 1e6, 1e4)
    works = [
        StepWork(
            (dataclasses.replace(block, kernels=kernels, all_reduces=sums),),
            8,
            "decode",
            "bfloat16",
        )
        for kernels, sums in ((None, 2), (1, 2), (None, 1))
    ]
    usual, short, summed = (predict(work, TENSOR, H100) for work in works)
    saved = (STOCK.kernels_per_layer - 1) * STOCK.kernel_seconds
    assert usual.step_seconds - short.step_seconds == pytest.approx(saved)
    assert (usual.collectives, summed.collectives) == (2, 1)
    assert summed.link_bytes == usual.link_bytes / 2


DEVICES = st.sampled_from([H100, H200, A100, B200, L40S])
SHAPES = st.builds(
    Strategy, st.just("any"), *[st.sampled_from([1, 2, 4])] * 3, st.sampled_from([None, 1, 2, 8])
)


@st.composite
def works(draw):
    size = draw(st.sampled_from([4, 8, 16, 32]))
    model = {
        "layers": draw(st.integers(4, 9)),
        "heads": size,
        "mlp": 512 * size,
        "dtype": "bfloat16",
    }
    kind = draw(st.sampled_from(["decode", "forward", "training"]))
    batch, context = draw(st.integers(1, 70)), draw(st.sampled_from([16, 128, 4096]))
    if kind == "decode":
        return dense_decode(batch=batch, context=context, **model)
    return dataclasses.replace(dense_prefill(batch=batch, context=context, **model), kind=kind)


# Training walks a schedule's table for every prediction.
quick = settings(max_examples=60, deadline=None)


@quick
@given(works(), SHAPES, DEVICES)
def test_nothing_beats_its_bound_and_the_parts_add_up(work, strategy, device):
    found = predict(work, strategy, device)
    assert found.lower_bound_seconds <= found.step_seconds * (1 + 1e-9)
    assert found.seconds_by_part.seconds == pytest.approx(found.step_seconds)
    assert found.bound_by in ("memory", "cache", "arithmetic", "links", "latency")
    if work.kind == "decode":
        assert found.lower_bound_per_second <= ideal_per_second(
            work, device, strategy.num_devices
        ) * (1 + 1e-9) or (found.is_resident or found.weight_bytes <= device.usable_l2_bytes)


@quick
@given(works(), DEVICES, st.integers(1, 16), st.integers(1, 16))
def test_more_replicas_are_never_slower(work, device, few, more):
    few, more = min(few, more), max(few, more)
    work = work if work.kind == "decode" else dataclasses.replace(work, kind="forward")
    slow, fast = (predict(work, Strategy("replicas", data=data), device) for data in (few, more))
    assert fast.tokens_per_second >= slow.tokens_per_second * (1 - 1e-9)


@quick
@given(works(), SHAPES, DEVICES, st.floats(1, 100))
def test_a_faster_link_never_hurts(work, strategy, device, times):
    better = dataclasses.replace(
        device,
        link_bandwidth=device.link_bandwidth * times,
        link_latency=device.link_latency / times,
    )
    assert predict(work, strategy, better).step_seconds <= predict(
        work, strategy, device
    ).step_seconds * (1 + 1e-9)


@quick
@given(
    works(),
    SHAPES,
    DEVICES,
    st.floats(1, 4),
    st.sampled_from(["weight_bytes", "state_bytes", "send_bytes", "flops"]),
)
def test_more_to_do_is_never_faster(work, strategy, device, times, figure):
    layers = [
        dataclasses.replace(layer, **{figure: times * getattr(layer, figure)})
        for layer in work.layers
    ]
    larger = predict(dataclasses.replace(work, layers=tuple(layers)), strategy, device)
    found = predict(work, strategy, device)
    assert larger.step_seconds >= found.step_seconds * (1 - 1e-9)
    assert larger.bytes_per_device >= found.bytes_per_device


@quick
@given(works(), DEVICES)
def test_on_one_device_all_strategies_are_one(work, device):
    names = (
        "one device",
        "replicas",
        "tensor",
        "tensor x pipeline",
        "layer-wise",
        "layer-wise + tensor",
    )
    seconds = {predict(work, Strategy(name), device).step_seconds for name in names}
    assert len(seconds) == 1
    assert len(best_strategies(work, 1, device)) == 1
    assert predict(work, ONE, device).link_bytes == 0


@quick
@given(DEVICES, st.integers(2, 8), st.integers(1, 8))
def test_a_ring_with_fewer_groups_than_stages_has_bubbles(device, stages, groups):
    work = dense_decode(layers=8, batch=64, context=1024)
    found = predict(work, Strategy("layer-wise", stage=stages, groups=groups), device)
    assert found.num_ticks == max(stages, groups)
    assert found.bubble_share == pytest.approx(max(0, 1 - groups / stages))
    full = predict(work, Strategy("layer-wise", stage=stages), device)
    assert full.bubble_share == 0
    if groups < stages:
        assert full.lower_bound_seconds <= found.lower_bound_seconds * (1 + 1e-9)
