"""V-shaped schedules are what the literature says of them.

Index letters: p devices, M microbatches. Orders by hand follow the published steps.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise_jax.schedule.arrays import lower_schedule
from layerwise_jax.schedule.timing import simulate_schedule
from layerwise_jax.schedule.v_shaped import dualpipe_v, zb_v
from layerwise_jax.schedule.validation import check
from tests.support.schedule_cases import microbatch_counts, properties, stage_counts

GENERATORS = {"zb_v": zb_v, "dualpipe_v": dualpipe_v}


def column(schedule, device):
    """The cells of a device that are not idle, as text."""
    cells = ["+".join(map(str, row[device])) for row in schedule.ticks]
    return " ".join(cell for cell in cells if cell)


def test_zb_v_of_two_devices_by_hand():
    schedule = zb_v(2, 4)
    # Warm-up, F1 I1 W1 twice, two steady rounds (one with a forward of stage 0), drain.
    assert column(schedule, 0) == (
        "0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0F3 0I0 0W0 3F2 3I2 3W2 0I1 0W1 3F3 3I3 3W3 "
        "0I2 0W2 0I3 0W3"
    )
    assert column(schedule, 1) == (
        "1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 2W1 1F3 1I1 1W1 2F3 2I2 2W2 1I2 2I3 "
        "1I3 1W2 2W3 1W3"
    )


def test_dualpipe_v_of_two_devices_by_hand():
    schedule = dualpipe_v(2, 4)
    # Steps 1 to 8 of the published schedule; pairs share a tick.
    assert column(schedule, 0) == (
        "0F0 0F1 0F2 3F0 3I0 3W0 3F1 0F3+3B1 3F2+0B0 3B2 3F3+0B1 3B3 0I2 0W2 0I3 0W3"
    )
    assert column(schedule, 1) == (
        "1F0 2F0 1F1 2F1 1F2 2B0 2F2+1B0 1F3+2B1 2F3+1B1 2B2 1B2 2I3 1I3 2W3 1W3"
    )


@pytest.mark.parametrize("generate", GENERATORS.values(), ids=GENERATORS)
def test_stages_are_placed_in_a_v(generate):
    assert generate(3, 7).stages_of_device == ((0, 5), (1, 4), (2, 3))
    assert not generate(3, 7).is_round_robin
    # On one device, up and down are the same place.
    assert generate(1, 3).stages_of_device == ((0, 1),)


@properties
@given(st.sampled_from(list(GENERATORS)), stage_counts, microbatch_counts)
def test_any_number_of_microbatches_gives_a_valid_table_within_its_memory(name, p, M):
    schedule = GENERATORS[name](p, M)
    check(schedule)
    assert (schedule.num_stages, schedule.num_microbatches) == (2 * p, M)
    bound = 2 * p if name == "zb_v" else 2 * p + 1
    assert max(schedule.peak_live_microbatches()) <= min(bound, 2 * M)


@properties
@given(st.sampled_from(list(GENERATORS)), stage_counts, st.integers(0, 9))
def test_the_bubble_is_a_tick_for_each_hop_of_the_ramp(name, p, more):
    M = 2 * p + more
    # Forward, input and weight gradient of equal time: 6 M busy seconds, and p - 1 to reach the
    # last device.
    simulation = simulate_schedule(GENERATORS[name](p, M), 1, 2, 1)
    assert simulation.busy_seconds == (6.0 * M,) * p
    assert simulation.makespan == 6 * M + p - 1
    assert simulation.bubble_share == pytest.approx((p - 1) / (6 * M + p - 1))
    # Zero bubble: no device of ZB-V waits between its first and its last action.
    if name == "zb_v":
        for device in range(p):
            spans = [span for span in simulation.spans if span.device == device]
            assert spans[-1].end - spans[0].start == 6 * M


@pytest.mark.parametrize("generate", GENERATORS.values(), ids=GENERATORS)
def test_the_compiled_loop_refuses_them_by_name(generate):
    with pytest.raises(ValueError, match=r"must place stage 2 on device 0 of 2 .*executor='host'"):
        lower_schedule(generate(2, 4))


@pytest.mark.parametrize("generate", GENERATORS.values(), ids=GENERATORS)
def test_counts_below_one_are_refused(generate):
    with pytest.raises(ValueError, match="num_devices must be"):
        generate(0, 4)
    with pytest.raises(ValueError, match="num_microbatches must be"):
        generate(2, 0)
