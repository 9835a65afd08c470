"""The table is complete and sourced, the capacity law gives the known answers, and specs survive
JSON.
"""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise_jax.cost.device import DeviceSpec
from layerwise_jax.cost.devices import A100, CPU, DEVICES, H100, H200, L4, L40S, device_named
from layerwise_jax.cost.memory import MemoryLevel
from layerwise_jax.measure.detect import as_reported, detect_device

MIB = 2**20
# d_model 4096 in 32 heads of 128, MLP 16384: 12 x 4096 x 4096 weights of two bytes.
SEED_LAYER_BYTES = 402_653_184


@pytest.mark.parametrize("spec", DEVICES, ids=lambda spec: spec.name)
def test_every_figure_has_a_source_and_makes_sense(spec):
    assert all(spec.sources.values())
    assert 0.5 * spec.l2_bytes < spec.usable_l2_bytes < spec.l2_bytes < spec.memory_bytes
    bandwidths = [level.bandwidth for level in spec.levels]
    assert bandwidths == sorted(bandwidths, reverse=True)
    assert spec.link_bandwidth < spec.memory_bandwidth < spec.l2_bandwidth
    assert (
        spec.rate("float64")
        <= spec.rate("float32")
        <= spec.rate("bfloat16")
        == spec.rate("float16")
    )


@pytest.mark.parametrize("spec", DEVICES, ids=lambda spec: spec.name)
def test_json_round_trip(spec):
    assert DeviceSpec.from_json(spec.to_json()) == spec
    assert hash(DeviceSpec.from_json(spec.to_json())) == hash(spec)


@pytest.mark.parametrize("spec", DEVICES, ids=lambda spec: spec.name)
def test_devices_are_found_by_the_kind_that_jax_reports(spec):
    assert device_named(spec.name) is spec
    assert device_named(spec.name.upper()) is spec


def test_other_names_of_a_device():
    assert device_named("H100") is H100
    assert device_named("NVIDIA A100 80GB PCIe") is A100
    with pytest.raises(ValueError, match=r"kind must be a known device .*, got 'TPU v5'"):
        device_named("TPU v5")


@pytest.mark.parametrize(("bits", "ways"), [(16, 11), (8, 6), (4, 3)])
def test_the_seed_layer_wants_so_many_tensor_ways_on_an_h100(bits, ways):
    assert H100.tensor_ways_to_fit(SEED_LAYER_BYTES * bits // 16) == ways


def test_sixteen_h100s_hold_a_third_of_a_billion_half_precision_parameters():
    assert H100.resident_parameters(16, bits=16) == pytest.approx(0.31e9, rel=0.01)
    assert H100.resident_parameters(16, bits=4) == 4 * H100.resident_parameters(16, bits=16)


@given(st.integers(1, 2**40), st.sampled_from([4, 8, 16, 32]))
def test_the_capacity_law_turned_round_is_tight(parameters, bits):
    devices = H100.devices_to_hold(parameters, bits)
    assert H100.resident_parameters(devices, bits) >= parameters
    assert devices == 1 or H100.resident_parameters(devices - 1, bits) < parameters


@given(st.integers(1, 2**45))
def test_tensor_ways_are_the_fewest_that_fit(weight_bytes):
    ways = H200.tensor_ways_to_fit(weight_bytes)
    assert weight_bytes <= ways * H200.usable_l2_bytes
    assert ways == 1 or weight_bytes > (ways - 1) * H200.usable_l2_bytes


def test_rates_go_by_the_beginning_of_the_dtype_and_fall_back_on_wider_ones():
    assert H100.rate("float8_e4m3fn") == H100.flops_per_second["float8"]
    assert A100.rate("float8_e5m2") == A100.flops_per_second["float16"]
    assert A100.rate("float4_e2m1fn") == A100.flops_per_second["float16"]
    assert CPU.rate("bfloat16") == CPU.flops_per_second["float32"]
    assert H100.rate("complex64") == H100.rate("int32") == H100.flops_per_second["float32"]
    assert H100.rate("uint8") == H100.flops_per_second["int8"]
    with pytest.raises(ValueError, match=r"dtype must be one that .* has a rate for .*got key"):
        H100.rate("key<fry>")


def test_the_roofline_is_the_longer_of_computing_and_reading():
    assert H100.seconds(989.4e12, 0, "float16") == pytest.approx(1)
    assert H100.seconds(0, 3.35e12, "float16") == pytest.approx(1)
    assert H100.seconds(0, 3.35e12, "float16", resident=True) == pytest.approx(3.35 / 8.4)
    assert H100.transfer_seconds(450e9) == pytest.approx(1 + H100.link_latency)


def test_a_part_of_a_gpu_has_a_part_of_its_cache():
    part = as_reported(H100, 25 * MIB, 60)
    assert (part.l2_bytes, part.usable_l2_bytes, part.multiprocessors) == (
        25 * MIB,
        H100.usable_l2_bytes // 2,
        60,
    )
    assert "driver" in part.sources["l2_bytes"]
    assert as_reported(H100, H100.l2_bytes, H100.multiprocessors) is H100


def test_a_cpu_is_detected_as_the_stand_in():
    assert detect_device() is CPU


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"l2_bytes": -1}, "l2_bytes must be positive and finite, got -1"),
        ({"l2_bytes": 1.5}, "l2_bytes must be of type int, got 1.5"),
        ({"multiprocessors": True}, "multiprocessors must be of type int, got True"),
        ({"memory_bandwidth": math.nan}, "memory_bandwidth must be positive and finite, got nan"),
        (
            {"flops_per_second": {"float16": 0}},
            r"flops_per_second\['float16'\] must be positive and finite, got 0",
        ),
        ({"flops_per_second": [1]}, r"flops_per_second must be of type Mapping.*, got \[1\]"),
        ({"usable_l2_bytes": L4.l2_bytes + 1}, "usable_l2_bytes must be at most l2_bytes"),
        ({"compute_capability": 8.9}, "compute_capability must be of type str.*, got 8.9"),
        ({"sources": {}}, "sources must have an entry for every figure"),
    ],
)
def test_what_is_wrong_is_named(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        L4.updated(**change)


@pytest.mark.parametrize("text", ["", "[]", "3", '"H100"', "{}", "not JSON"])
def test_other_text_is_no_spec(text):
    with pytest.raises(ValueError, match=r"JSON|version"):
        DeviceSpec.from_json(text)


def test_missing_and_unknown_fields_are_named():
    fields = json.loads(L40S.to_json())
    del fields["clock_hz"]
    with pytest.raises(
        ValueError, match=r"without \['clock_hz'\] and with the unknown \['colour'\]"
    ):
        DeviceSpec.from_json(json.dumps({**fields, "colour": "green"}))


def test_levels_are_found_by_name():
    assert [level.name for level in H100.levels] == ["shared", "l2", "memory"]
    # 132 multiprocessors of 228 KiB, of which a block may use 227.
    assert H100.level("shared").bytes == 132 * 228 * 1024
    assert H100.level("shared").usable_bytes == 132 * 227 * 1024
    assert H100.level("l2") == MemoryLevel("l2", 50 * MIB, 37 * MIB, 8.4e12)
    assert H100.level("memory").usable_bytes == H100.memory_bytes
    with pytest.raises(ValueError, match="must be one of 'l2', 'memory', got 'shared'"):
        CPU.level("shared")


def test_levels_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="name must be one of shared, l2, memory, got 'l3'"):
        MemoryLevel("l3", 1, 1, 1.0)
    with pytest.raises(ValueError, match=r"levels must be .* got \['memory', 'l2'\]"):
        dataclasses.replace(CPU, levels=CPU.levels[::-1])
    with pytest.raises(TypeError, match="got l4_bytes"):
        CPU.updated(l4_bytes=1)


def test_a_file_of_version_1_is_still_read():
    calibrated = Path("experiments/calibrate/results/nvidia_h200.json").read_text()
    assert json.loads(calibrated)["version"] == 1
    spec = DeviceSpec.from_json(calibrated)
    assert (spec.l2_bytes, spec.usable_l2_bytes, spec.memory_bytes) == (
        62914560,
        51904512,
        151397597184,
    )
    assert [level.name for level in spec.levels] == ["l2", "memory"]
    assert DeviceSpec.from_json(spec.to_json()) == spec
    damaged = json.loads(calibrated)
    del damaged["memory_bandwidth"]
    with pytest.raises(ValueError, match=r"got no \['memory_bandwidth'\]"):
        DeviceSpec.from_json(json.dumps(damaged))
