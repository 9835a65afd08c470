"""A schedule is read back from its text, and what is no table is refused."""

import pytest
from hypothesis import given

from layerwise_jax.schedule.generators import forward_only, interleaved_1f1b, one_f_one_b
from layerwise_jax.schedule.table import Schedule, ScheduleError
from layerwise_jax.schedule.validation import check
from tests.support.schedule_cases import properties, random_tables, schedules


@properties
@given(random_tables())
def test_random_tables_are_valid_and_are_read_back_from_their_text(schedule):
    check(schedule)
    assert Schedule.parse(str(schedule)) == schedule


@properties
@given(random_tables())
def test_stages_devices_and_microbatches_in_flight_agree(schedule):
    assert {
        stage: device for device, stages in enumerate(schedule.stages_of_device) for stage in stages
    } == schedule.device_of_stage
    for device, peak in enumerate(schedule.peak_live_microbatches()):
        counts = [schedule.in_flight(stage) for stage in schedule.stages_of_device[device]]
        assert max(counts, default=0) <= peak <= sum(counts)
    for stage in range(schedule.num_stages):
        assert 1 <= schedule.in_flight(stage, until="I") <= schedule.in_flight(stage)
        assert schedule.in_flight(stage) <= schedule.num_microbatches


def test_microbatches_in_flight_are_counted_by_hand():
    schedule = Schedule.parse("0F0 .\n0F1 1F0\n. 1I0\n0B0 1F1\n. 1B1\n0B1 1W0")
    # Stage 1 holds microbatch 0 until its weight gradient, the last action.
    assert (schedule.in_flight(0), schedule.in_flight(1)) == (2, 2)
    assert schedule.in_flight(1, until="I") == 1
    assert forward_only(2, 3).in_flight(0) == 0
    with pytest.raises(ValueError, match=r"stage must be in 0\.\.1, got 2"):
        schedule.in_flight(2)


@properties
@given(schedules())
def test_every_generated_schedule_is_read_back_from_its_text(schedule):
    assert Schedule.parse(str(schedule)) == schedule


def test_1f1b_prints_as_in_the_module_docstring():
    assert str(one_f_one_b(2, 3)).splitlines() == [
        "0F0  .",
        "0F1  1F0",
        ".    1B0",
        "0B0  1F1",
        "0F2  1B1",
        "0B1  1F2",
        ".    1B2",
        "0B2  .",
    ]


def test_a_repr_is_one_line():
    assert repr(one_f_one_b(2, 3)) == "Schedule(2 stages, 2 devices, 3 microbatches, 8 ticks)"
    assert repr(one_f_one_b(1, 1)) == "Schedule(1 stage, 1 device, 1 microbatch, 2 ticks)"


def test_a_table_is_read_with_comments_and_blank_lines():
    text = """
    # two stages, one microbatch
    0F0   .        # fill
    .     1F0+1B0

    0B0   .
    """
    assert Schedule.parse(text) == one_f_one_b(2, 1, paired=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at least one action"),
        (". .", "at least one action"),
        ("0F0 .\n1F0", "tick 1 must have 2 cells .* got 1"),
        ("0F0 1X0", "got '1X0'"),
        ("0F0+0F1", "one forward and then one backward"),
        ("0B0+0F0", "one forward and then one backward"),
        ("0F0+0I0+0W0", "one forward and then one backward"),
    ],
)
def test_text_that_is_no_table_is_refused(text, message):
    with pytest.raises(ScheduleError, match=message):
        Schedule.parse(text)


def test_a_schedule_knows_its_extent_and_where_its_stages_live():
    schedule = interleaved_1f1b(2, 2, 3)
    assert (schedule.num_devices, schedule.num_stages, schedule.num_microbatches) == (2, 4, 3)
    assert schedule.device_of_stage == {0: 0, 1: 1, 2: 0, 3: 1}
    assert schedule.has_backward
    assert not forward_only(2, 3).has_backward


def test_a_microbatch_is_live_from_its_forward_to_its_weight_gradient():
    split = Schedule.parse("0F0\n0F1\n0I0\n0W0\n0B1")
    assert split.lifetimes == {(0, 0): (0, 3), (0, 1): (1, 4)}
    assert split.live_microbatches() == ((1,), (2,), (2,), (2,), (1,))
    assert split.peak_live_microbatches() == (2,)
