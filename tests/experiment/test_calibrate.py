"""Calibration: the kernel's sums, and the knee of known curves."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.calibrate.curve import Calibration, calibrated, calibration_of
from experiments.calibrate.picture import draw_curve
from experiments.calibrate.reads import (
    BLOCK,
    BLOCK_BYTES,
    MIB,
    Reading,
    persistent_reader,
    plain_reader,
    read_curve,
    round_counts,
)
from layerwise_jax.cost.devices import H200, DeviceSpec
from layerwise_jax.xla.aot import can_compile_for_absent_gpus, compile_for


def curve_of(*points: tuple[float, float]) -> list[Reading]:
    return [Reading(int(size * MIB), bandwidth) for size, bandwidth in points]


KNOWN_H200 = curve_of(
    (8, 8.2e12), (24, 8.6e12), (40, 8.3e12), (48, 8.0e12), (56, 6.6e12), (64, 4.7e12), (256, 4.6e12)
)


@pytest.mark.parametrize("rounds", [1, 3])
def test_the_kernel_sums_what_plain_jax_sums(rounds):
    programs, passes = 4, 2
    data = jnp.arange(3 * programs * BLOCK, dtype=jnp.float32) % 1000
    counts = jnp.array([rounds, passes], jnp.int32)
    kernel, plain = persistent_reader(programs, interpret=True), plain_reader(programs)
    wanted = passes * np.asarray(data).reshape(3, -1)[:rounds].sum(0)
    np.testing.assert_array_equal(kernel(data, counts), wanted)
    np.testing.assert_array_equal(plain(data, counts), wanted)


@pytest.mark.skipif(
    not can_compile_for_absent_gpus(), reason="the CUDA plugin (extra aot) is not installed"
)
def test_the_kernel_compiles_for_an_h200():
    import jax

    programs = 8 * H200.multiprocessors
    data = jax.ShapeDtypeStruct((4 * programs * BLOCK,), jnp.float32)
    compiled = compile_for(
        H200, persistent_reader(programs), [data, jax.ShapeDtypeStruct((2,), jnp.int32)]
    )
    assert compiled.argument_bytes == 4 * programs * BLOCK_BYTES + 8
    assert compiled.temp_bytes == 0


def test_bandwidth_is_bytes_over_the_best_time():
    ticks = iter(np.cumsum([0.0, 5.0, 0.0, 2.0, 0.0, 3.0, 0.0, 4.0]))
    (reading,) = read_curve(
        plain_reader(2), 2, [3], 10 * 3 * 2 * BLOCK_BYTES, clock=lambda: next(ticks)
    )
    assert reading == Reading(3 * 2 * BLOCK_BYTES, 10 * 3 * 2 * BLOCK_BYTES / 2.0)


def test_a_reader_that_skips_blocks_is_found_out():
    with pytest.raises(RuntimeError, match="does not read what it should"):
        read_curve(lambda data, counts: data[: 2 * BLOCK], 2, [3], MIB)


def test_round_counts_cover_what_was_asked():
    programs = 8 * 132
    sizes = [count * programs * BLOCK_BYTES for count in round_counts(programs, 8 * MIB, 512 * MIB)]
    assert sizes[0] == pytest.approx(8 * MIB, rel=0.1)
    assert sizes[-1] >= 512 * MIB
    assert all(
        a < b <= max(1.2 * a, a + programs * BLOCK_BYTES) for a, b in itertools.pairwise(sizes)
    )


def test_the_knee_is_before_the_drop():
    found = calibration_of(KNOWN_H200, H200.l2_bytes)
    assert found == Calibration(knee=48 * MIB, l2_bandwidth=8.4e12, memory_bandwidth=4.6e12)


def test_a_recovery_after_the_drop_moves_no_knee():
    bumpy = curve_of((8, 8e12), (24, 8e12), (32, 5e12), (40, 8e12), (256, 4e12))
    assert calibration_of(bumpy, H200.l2_bytes).knee == 24 * MIB


def test_a_curve_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match="beyond 4 times"):
        calibration_of(KNOWN_H200[:-1], H200.l2_bytes)


def test_what_was_measured_takes_the_place_of_the_table():
    spec = calibrated(H200, Calibration(45 * MIB, 8.1e12, 4.5e12), "measured here")
    assert (spec.usable_l2_bytes, spec.l2_bandwidth, spec.memory_bandwidth) == (
        45 * MIB,
        8.1e12,
        4.5e12,
    )
    assert spec.sources["usable_l2_bytes"] == "measured here"
    assert spec.sources["memory_bytes"] == H200.sources["memory_bytes"]
    assert DeviceSpec.from_json(spec.to_json()) == spec


def test_the_picture_is_drawn(tmp_path):
    path = draw_curve(
        H200, KNOWN_H200, calibration_of(KNOWN_H200, H200.l2_bytes), tmp_path / "curve.png"
    )
    assert path.read_bytes().startswith(b"\x89PNG")
