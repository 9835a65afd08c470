"""Deferred weight gradients: the last backwards of a stage are split, and their W end the step."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise_jax.schedule.arrays import lower_schedule
from layerwise_jax.schedule.deferral import defer
from layerwise_jax.schedule.generators import forward_only, gpipe, one_f_one_b, zero_bubble
from layerwise_jax.schedule.table import Action
from layerwise_jax.schedule.timing import simulate_schedule
from layerwise_jax.schedule.validation import check
from tests.support.schedule_cases import properties, random_tables


def test_a_deferred_table_by_hand():
    assert str(defer(one_f_one_b(2, 3), [2, 1])).splitlines() == [
        "0F0  .",
        "0F1  1F0",
        ".    1B0",
        "0B0  1F1",
        "0F2  1B1",
        "0I1  1F2",
        ".    1I2",
        "0I2  1W2",
        "0W1  .",
        "0W2  .",
    ]


def test_in_a_paired_table_the_backward_of_the_pair_is_split():
    deferred = defer(one_f_one_b(1, 2, paired=True), 1)
    assert str(deferred).splitlines() == ["0F0+0B0", "0F1+0I1", "0W1"]


@properties
@given(random_tables(), st.data())
def test_any_deferral_of_any_table_is_valid(schedule, data):
    whole = [
        sum(
            Action(s, "B", m) in dict.fromkeys(a for _, _, a in schedule.actions())
            for m in range(9)
        )
        for s in range(schedule.num_stages)
    ]
    counts = [data.draw(st.integers(0, most)) for most in whole]
    deferred = defer(schedule, counts)
    check(deferred)
    assert deferred.device_of_stage == schedule.device_of_stage
    before, after = ([a for _, _, a in each.actions()] for each in (schedule, deferred))
    for stage, count in enumerate(counts):
        # The order of the stage's backwards stays; the last `count` are split.
        kept = [a.microbatch for a in before if a.stage == stage and a.kind == "B"]
        split = kept[len(kept) - count :]
        assert [a.microbatch for a in after if a.stage == stage and a.kind == "B"] == (
            kept[: len(kept) - count]
        )
        new = {Action(stage, kind, m) for kind in ("I", "W") for m in split}
        assert new <= set(after)
        if count < len(kept):
            assert deferred.in_flight(stage) >= schedule.in_flight(stage)


def test_deferral_shortens_the_drain_and_runs_in_the_loop():
    schedule = one_f_one_b(4, 8)
    deferred = defer(schedule, 2)
    plain, shorter = (simulate_schedule(each, 1, 2).makespan for each in (schedule, deferred))
    # Two backwards less on the way of the last gradient from stage 3 to stage 0, a second each.
    assert (plain, shorter) == (33, 31)
    assert deferred.peak_live_microbatches() == (4, 3, 2, 2)
    assert lower_schedule(deferred).num_stash_slots == 4


def test_what_cannot_be_deferred_is_refused():
    with pytest.raises(ValueError, match="one for each of 2 stages, got 3"):
        defer(gpipe(2, 2), [1, 1, 1])
    with pytest.raises(ValueError, match=r"counts\[1\] must be at most 2, the B of stage 1, got 3"):
        defer(gpipe(2, 2), [2, 3])
    with pytest.raises(ValueError, match=r"counts\[0\] must be an int of at least 0, got -1"):
        defer(gpipe(2, 2), -1)
    # Tables without whole backwards have none to split.
    for schedule in (zero_bubble(2, 2), forward_only(2, 2)):
        assert defer(schedule, 0) == schedule
        with pytest.raises(ValueError, match="must be at most 0"):
            defer(schedule, 1)
