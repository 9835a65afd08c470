"""A simulation keeps to the devices, to the links and to the costs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise_jax.schedule.generators import (
    forward_only,
    gpipe,
    interleaved_1f1b,
    one_f_one_b,
    zero_bubble,
)
from layerwise_jax.schedule.timing import simulate_schedule
from tests.support.schedule_cases import properties, schedules


def test_a_link_delays_only_what_crosses_devices():
    assert simulate_schedule(gpipe(2, 1), 1, 2, link_seconds=0.25).makespan == 6.5
    assert simulate_schedule(interleaved_1f1b(1, 2, 1), 1, 2, link_seconds=0.25).makespan == 6.0
    assert simulate_schedule(gpipe(3, 1), 1, 2, link_seconds=[0.25, 1.0]).makespan == 9 + 2 * 1.25
    assert (
        simulate_schedule(gpipe(3, 1), 1, 2, link_seconds=[0.25, 1.0], lockstep=True).makespan
        == 9 + 2 * 1.25
    )


def test_microbatches_may_differ_in_size():
    # Sizes 1, 3, 2 on two stages, 1 second an example forward, 2 backward.
    sizes = [1.0, 3.0, 2.0]
    forward = [sizes, sizes]
    backward = [[2 * size for size in sizes]] * 2
    simulation = simulate_schedule(gpipe(2, 3), forward, backward)
    # Stage 1: forwards to 9, backwards of 2, 6 and 4 seconds to 11, 17 and 21. Stage 0: backwards
    # from 11, from 17 to 23, and from 23 to 27.
    assert simulation.makespan == 27
    assert simulation.busy_seconds == (18, 18)
    assert simulate_schedule(gpipe(2, 3), 2, [1, 2]).busy_seconds == (9, 12)


def test_uneven_stages_wait_for_the_slowest():
    simulation = simulate_schedule(forward_only(3, 4), [1, 3, 2], 0)
    assert simulation.makespan == 1 + 4 * 3 + 2
    assert simulation.busy_seconds == (4, 12, 8)
    assert simulation.idle_seconds == (11, 3, 7)


@properties
@given(schedules(), st.data())
def test_a_simulation_respects_devices_and_messages(schedule, data):
    seconds = st.floats(0, 4)
    per_stage = st.lists(seconds, min_size=schedule.num_stages, max_size=schedule.num_stages)
    link, lockstep = data.draw(seconds), data.draw(st.booleans())
    simulation = simulate_schedule(
        schedule, data.draw(per_stage), data.draw(per_stage), link_seconds=link, lockstep=lockstep
    )
    spans = {effect: span for span in simulation.spans for effect in span.action.effects}
    free_at = [0.0] * schedule.num_devices
    for action, device, start, end in simulation.spans:
        assert start >= free_at[device]
        free_at[device] = end
        for need in action.needs(schedule.num_stages):
            sender = spans[need]
            assert start >= sender.end + (link if sender.device != device else 0)
    assert 0 <= simulation.bubble_share <= 1


def test_a_simulation_prints_its_figures():
    lines = str(simulate_schedule(one_f_one_b(2, 3), 1, 2)).splitlines()
    assert lines[0] == "makespan 12 s, bubble 25.0%"
    assert [line.split() for line in lines[2:]] == [["0", "9", "3", "2"], ["1", "9", "3", "1"]]


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        ({"forward_seconds": [1, 2, 3]}, r"forward_seconds must .*\(2,\), .* \(2, 2\), got \(3,\)"),
        ({"backward_seconds": -1}, "backward_seconds must be at least 0"),
        ({"link_seconds": [1, 1]}, r"link_seconds must .*\(1,\), one number for each boundary"),
        (
            {"weight_gradient_seconds": 5},
            "weight_gradient_seconds of stage 0 must be at most .*2.0, .* got 5.0",
        ),
    ],
)
def test_costs_that_make_no_sense_are_refused(costs, message):
    with pytest.raises(ValueError, match=message):
        simulate_schedule(
            zero_bubble(2, 2), **{"forward_seconds": 1, "backward_seconds": 2} | costs
        )
