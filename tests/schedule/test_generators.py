"""The generated schedules are what the literature says of them.

Index letters: k stages or devices, M microbatches, v stages a device, f and b seconds forward and
backward.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise_jax.schedule.generators import (
    forward_only,
    gpipe,
    interleaved_1f1b,
    interleaved_zero_bubble,
    looped_bfs,
    one_f_one_b,
    zero_bubble,
)
from layerwise_jax.schedule.timing import simulate_schedule
from tests.support.schedule_cases import (
    ONE_STAGE_A_DEVICE,
    microbatch_counts,
    properties,
    stage_counts,
)


@pytest.mark.parametrize("generate", ONE_STAGE_A_DEVICE.values(), ids=ONE_STAGE_A_DEVICE)
def test_a_generated_schedule_covers_what_was_asked_for(generate):
    schedule = generate(3, 5)
    assert (schedule.num_stages, schedule.num_microbatches, schedule.num_devices) == (3, 5, 3)


def test_interleaving_has_megatrons_order_where_the_devices_divide_the_microbatches():
    # The first of 4 devices with 2 stages each warms up with 2 (4 - 1) + (2 - 1) 4 forwards, then
    # does one and one.
    first_device = [
        str(action) for _, device, action in interleaved_1f1b(4, 2, 8).actions() if device == 0
    ]
    assert first_device[:12] == "0F0 0F1 0F2 0F3 4F0 4F1 4F2 4F3 0F4 0F5 0F6 4B0".split()


@pytest.mark.parametrize(
    "generate", [*ONE_STAGE_A_DEVICE.values(), lambda k, M: interleaved_1f1b(k, 2, M)]
)
def test_counts_below_one_are_refused(generate):
    with pytest.raises(ValueError, match=r"must be .* at least 1, got 0"):
        generate(0, 4)
    with pytest.raises(ValueError, match="num_microbatches must be"):
        generate(2, 0)


@properties
@given(stage_counts, microbatch_counts, st.integers(1, 5), st.integers(1, 9))
def test_even_gpipe_and_1f1b_take_their_closed_form(k, M, f, b):
    for generate in (gpipe, one_f_one_b):
        simulation = simulate_schedule(generate(k, M), f, b)
        assert simulation.makespan == (M + k - 1) * (f + b)
        assert simulation.bubble_share == pytest.approx((k - 1) / (M + k - 1))
        assert simulation.idle_seconds == ((k - 1) * (f + b),) * k


@properties
@given(stage_counts, microbatch_counts)
def test_live_microbatches_have_their_closed_forms(k, M):
    assert gpipe(k, M).peak_live_microbatches() == (M,) * k
    assert one_f_one_b(k, M).peak_live_microbatches() == tuple(min(M, k - i) for i in range(k))
    assert one_f_one_b(k, M, paired=True).peak_live_microbatches() == tuple(
        min(M, 2 * (k - i) - 1) for i in range(k)
    )
    assert max(zero_bubble(k, M).peak_live_microbatches()) == min(M, k)
    assert forward_only(k, M).peak_live_microbatches() == (0,) * k


@properties
@given(stage_counts, microbatch_counts, st.integers(1, 3))
def test_a_zero_bubble_is_shorter_than_1f1b(k, M, f):
    split, whole = (
        simulate_schedule(generate(k, M), f, 2 * f).makespan
        for generate in (zero_bubble, one_f_one_b)
    )
    if k <= M:
        # Qi et al. 2024, with input and weight gradient as long as a forward: a bubble of (k - 1)
        # f.
        assert split == (3 * M + k - 1) * f
        assert split < whole or k == 1


@properties
@given(stage_counts, st.integers(1, 4), microbatch_counts)
def test_interleaving_divides_the_bubble_whether_or_not_the_devices_divide_the_microbatches(
    k, v, M
):
    simulation = simulate_schedule(interleaved_1f1b(k, v, M), 1.0, 1.0)
    if k <= M:
        assert simulation.idle_seconds == (2 * (k - 1),) * k
        assert simulation.makespan == 2 * (M * v + k - 1)


@properties
@given(stage_counts, microbatch_counts, st.integers(1, 3), st.integers(1, 9))
def test_pairs_keep_step_and_take_no_longer(k, M, f, b):
    paired = simulate_schedule(one_f_one_b(k, M, paired=True), f, b, lockstep=True)
    assert paired.makespan <= simulate_schedule(one_f_one_b(k, M), f, b, lockstep=True).makespan
    assert paired.makespan == (M + k - 1) * (f + b)


@properties
@given(stage_counts, st.integers(1, 4), microbatch_counts, st.integers(1, 5), st.integers(1, 9))
def test_looped_breadth_first_takes_its_closed_form_and_holds_everything(k, v, M, f, b):
    schedule = looped_bfs(k, v, M)
    assert schedule.peak_live_microbatches() == (v * M,) * k
    if k <= M:
        simulation = simulate_schedule(schedule, f, b)
        assert simulation.makespan == (v * M + k - 1) * (f + b)
        assert simulation.idle_seconds == ((k - 1) * (f + b),) * k


def test_looped_breadth_first_runs_all_microbatches_of_a_stage_together():
    first_device = [
        str(action) for _, device, action in looped_bfs(2, 2, 3).actions() if not device
    ]
    assert first_device == "0F0 0F1 0F2 2F0 2F1 2F2 2B0 2B1 2B2 0B0 0B1 0B2".split()


@properties
@given(stage_counts, st.integers(1, 4), microbatch_counts)
def test_an_interleaved_zero_bubble_has_a_third_of_the_bubble_of_interleaved_1f1b(k, v, M):
    split = interleaved_zero_bubble(k, v, M)
    whole = interleaved_1f1b(k, v, M)
    made, ours = (simulate_schedule(each, 1, 2).makespan for each in (whole, split))
    assert ours <= made
    if M % k == 0:
        # With input and weight gradient as long as a forward, as ZB-H1: (k - 1) of 3 (k - 1).
        assert (ours, made) == (3 * v * M + k - 1, 3 * (v * M + k - 1))
    for device, (more, less) in enumerate(
        zip(split.peak_live_microbatches(), whole.peak_live_microbatches(), strict=True)
    ):
        assert more <= less + device


def test_an_interleaved_zero_bubble_of_one_stage_a_device_is_zb_h1():
    assert interleaved_zero_bubble(3, 1, 5) == zero_bubble(3, 5)
