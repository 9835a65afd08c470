"""A schedule that gives the right results is accepted; any other is refused, its fault shown in the
table.
"""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from layerwise_jax.schedule.generators import one_f_one_b
from layerwise_jax.schedule.table import Schedule, ScheduleError
from layerwise_jax.schedule.validation import check
from tests.support.schedule_cases import properties, schedules


def edited(schedule, tick, device, text):
    rows = [line.split() for line in str(schedule).splitlines()]
    rows[tick][device] = text
    return Schedule.parse("\n".join(" ".join(row) for row in rows))


@properties
@given(schedules())
def test_every_generated_schedule_is_valid(schedule):
    check(schedule, stash_bound=schedule.peak_live_microbatches())


def test_a_users_own_table_is_accepted_where_stages_are_anywhere_and_backwards_partly_split():
    own = Schedule.parse("""
        0F0  .
        .    1F0
        .    2F0
        .    2B0
        .    1I0
        0B0  1W0
    """)
    check(own, stash_bound=2)
    assert own.device_of_stage == {0: 0, 1: 1, 2: 1}


@pytest.mark.parametrize(
    ("tick", "device", "text", "message"),
    [
        (2, 0, "0F1", "device 0, tick 2: 0F1 repeats 0F1. Remove one"),
        (4, 0, ".", "0F2 is missing. Add it"),
        (2, 1, ".", "1I0 is missing, as is 1B0"),
        (2, 1, "1I0", "1W0 is missing"),
        (2, 0, "1I0", "device 1, tick 2: 1B0 repeats 1I0"),
    ],
)
def test_an_action_missing_or_repeated_is_refused(tick, device, text, message):
    with pytest.raises(ScheduleError, match=message):
        check(edited(one_f_one_b(2, 3), tick, device, text))


def test_a_result_used_before_it_is_there_is_shown_in_its_place():
    too_early = Schedule.parse("0F0 1F0\n. 1B0\n0B0 .")
    with pytest.raises(ScheduleError) as error:
        check(too_early)
    assert str(error.value).splitlines() == [
        (
            "device 1, tick 0: 1F0 must come after 0F0, whose result it reads and which is at "
            "tick 0. Move it to a later tick"
        ),
        "tick  device 0  device 1",
        "0     0F0       [1F0]",
        "1     .         1B0",
        "2     0B0       .",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0 .\n. 1F0\n0B0 1B0", "0B0 must come after 1I0"),
        ("0B0\n0F0", "0B0 must come after 0F0"),
        ("0F0\n0W0\n0I0", "0W0 must come after 0I0"),
        (
            "0F0 .\n. 1F0\n. 1B0\n. 0B0",
            "0B0 must be on device 0, .* got device 1",
        ),
    ],
)
def test_a_wrong_order_or_place_is_refused(text, message):
    with pytest.raises(ScheduleError, match=message):
        check(Schedule.parse(text))


def test_a_stash_bound_is_kept():
    schedule = one_f_one_b(4, 9)
    check(schedule, stash_bound=4)
    check(schedule, stash_bound=(4, 3, 2, 1))
    with pytest.raises(ScheduleError, match=r"tick 3: device 0 must hold at most 3 .* got 4"):
        check(schedule, stash_bound=3)
    with pytest.raises(ValueError, match="one for each of 4 devices, got 2"):
        check(schedule, stash_bound=(4, 3))


@properties
@given(schedules(), st.data())
def test_no_action_can_be_left_out(schedule, data):
    tick, device, action = data.draw(st.sampled_from(list(schedule.actions())))
    rows = [list(row) for row in schedule.ticks]
    rows[tick][device] = tuple(other for other in rows[tick][device] if other != action)
    assume(any(cell for row in rows for cell in row))
    shorter = Schedule(tuple(map(tuple, rows)))
    assume(extent(shorter) == extent(schedule))
    with pytest.raises(ScheduleError, match="is missing"):
        check(shorter)


def extent(schedule):
    return schedule.num_stages, schedule.num_microbatches, schedule.has_backward
