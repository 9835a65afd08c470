"""The capacity law, against figures worked out by hand."""

import pytest

from layerwise_jax.cost.capacity import capacity_bound, row_chunks_to_fit, streaming_notes
from layerwise_jax.cost.devices import H100, H200
from layerwise_jax.cost.layer_cost import LayerCost

MIB = 2**20


def layer(weight_bytes: int, activation_bytes: int = 0, buffer_bytes: int = 0) -> LayerCost:
    return LayerCost(f"layer of {weight_bytes}", weight_bytes, activation_bytes, buffer_bytes)


def test_sixteen_h100s_hold_a_third_of_a_billion_half_precision_parameters() -> None:
    assert H100.resident_parameters(16) == pytest.approx(0.31e9, rel=0.01)
    fits, too_many = (capacity_bound([layer(MIB)] * n, H100, 16) for n in (16 * 37, 16 * 37 + 1))
    assert fits.is_resident
    assert fits.resident_bytes == fits.weight_bytes == 2 * H100.resident_parameters(16)
    assert not too_many.is_resident


def test_the_law_for_the_seed_s_model() -> None:
    """16 layers of 201,326,592 float16 weights: 6.44 GB against 0.62 GB of usable cache."""
    verdict = capacity_bound([layer(402_653_184)] * 16, H100, 16)
    assert verdict.weight_bytes == 6_442_450_944
    assert verdict.resident_bytes == 16 * 37 * MIB
    # 6144 MiB over 37 MiB a device.
    assert verdict.devices_needed == {16: 167, 8: 84, 4: 42}
    assert verdict.tensor_ways == {16: 11, 8: 6, 4: 3}
    text = str(verdict)
    assert "Devices needed: 167 at fp16, 84 at fp8, 42 at 4 bits" in text
    assert "tensor ways: 11 at fp16, 6 at fp8, 3 at 4 bits" in text


def test_weights_counted_in_another_width_need_as_many_devices() -> None:
    single, half = (capacity_bound([layer(bits * 10 * MIB)], H100, 1, bits) for bits in (32, 16))
    assert single.devices_needed == {32: 9, **half.devices_needed}
    assert single.tensor_ways == {32: 9, **half.tensor_ways}
    assert "Devices needed: 9 at fp32, 5 at fp16, 3 at fp8, 2 at 4 bits" in str(single)


def test_one_layer_too_large_is_enough_to_refuse() -> None:
    verdict = capacity_bound([layer(38 * MIB), layer(MIB)], H100, 16)
    assert verdict.resident_bytes > verdict.weight_bytes
    assert (verdict.largest_layer, verdict.largest_layer_bytes) == (
        f"layer of {38 * MIB}",
        38 * MIB,
    )
    assert not verdict.is_resident


def test_a_capacity_takes_the_place_of_the_cache() -> None:
    verdict = capacity_bound([layer(10 * MIB)], H100, 2, capacity=4 * MIB)
    assert (verdict.usable_bytes, verdict.resident_bytes) == (4 * MIB, 8 * MIB)
    assert verdict.tensor_ways == {16: 3, 8: 2, 4: 1}


@pytest.mark.parametrize(
    ("weights", "activations", "chunks"),
    [(4, 5, 1), (4, 6, 1), (4, 7, 2), (4, 24, 4), (10, 1, None), (12, 0, None)],
)
def test_rows_are_chunked_into_the_room_that_weights_leave(
    weights: int, activations: int, chunks: int | None
) -> None:
    assert (
        row_chunks_to_fit(layer(weights, activations - 1, 1) if activations else layer(weights), 10)
        == chunks
    )


def test_only_stages_beyond_the_cache_stream() -> None:
    fits, beyond = [layer(H200.usable_l2_bytes)], [layer(H200.usable_l2_bytes), layer(0, 4_800_000)]
    (note,) = streaming_notes([fits, beyond], H200)
    assert note.startswith("stage 1 exceeds the cache by 4,800,000 bytes")
    assert f"{4_800_000 / H200.memory_bandwidth * 1e6:,.1f} us" in note
    assert streaming_notes([fits], H200) == []
