"""Every registered schedule is generated, placed and counted as its entry says."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise_jax.partition.options import COUNTED_SCHEDULES
from layerwise_jax.partition.solver import solve
from layerwise_jax.schedule.generators import forward_only, one_f_one_b
from layerwise_jax.schedule.registry import SCHEDULES, make_schedule
from layerwise_jax.schedule.validation import check
from tests.support.schedule_cases import microbatch_counts, properties, stage_counts


@properties
@given(st.sampled_from(list(SCHEDULES)), stage_counts, microbatch_counts, st.integers(1, 3))
def test_every_name_gives_a_valid_schedule_for_the_pipeline(name, k, M, v):
    family = SCHEDULES[name]
    v = family.stages_per_device or v
    schedule = make_schedule(name, v * k, M, k)
    check(schedule)
    assert (schedule.num_devices, schedule.num_stages, schedule.num_microbatches) == (k, v * k, M)
    assert [len(stages) for stages in schedule.stages_of_device] == [v] * k
    assert make_schedule(schedule, v * k, M, k) is schedule


@properties
@given(stage_counts, microbatch_counts)
def test_microbatches_in_flight_follow_from_the_place_as_the_entry_says(k, M):
    for name in COUNTED_SCHEDULES:
        family = SCHEDULES[name]
        schedule = family.generate(k, 1, M, False)
        counts = [schedule.in_flight(stage) for stage in reversed(range(k))]
        assert family.in_flight is not None
        assert counts == family.in_flight(np.arange(k), M).tolist()


def test_the_partitioner_takes_the_schedules_that_are_counted_by_place():
    stash = {"stash_bytes": [4, 4, 4], "num_microbatches": 2}
    # Stages 0, 1, 2 hold 2, 2 and 1 microbatches under 1F1B, 2 each under GPipe.
    one = solve([1, 1, 1], None, max_stages=3, exactly=True, capacity=99, **stash)
    assert one.stage_bytes == (8, 8, 4)
    all_of_them = solve(
        [1, 1, 1], None, max_stages=3, exactly=True, capacity=99, schedule="gpipe", **stash
    )
    assert all_of_them.stage_bytes == (8, 8, 8)
    with pytest.raises(ValueError, match=r"schedule must be one of '1f1b', 'gpipe'.*, got 'zb_v'"):
        solve([1, 1], None, max_stages=2, schedule="zb_v")


def test_stages_that_do_not_suit_a_schedule_are_refused_by_name():
    with pytest.raises(ValueError, match=r"num_stages must be 4 with schedule 'zb_v' .*got 6"):
        make_schedule("zb_v", 6, 4, 2)
    with pytest.raises(ValueError, match=r"multiple of the 2 .* 'looped_bfs', got 3"):
        make_schedule("looped_bfs", 3, 4, 2)
    with pytest.raises(ValueError, match=r"schedule must be one of '1f1b', .*got '2f2b'"):
        make_schedule("2f2b", 2, 2, 2)
    with pytest.raises(
        ValueError, match=r"for 3 stages and 2 microbatches .* got one for 2 stages"
    ):
        make_schedule(one_f_one_b(2, 2), 3, 2, 2)
    with pytest.raises(ValueError, match="forward only"):
        make_schedule(forward_only(2, 2), 2, 2, 2)


def test_devices_and_stages_that_were_not_given():
    v_shaped, any_number = SCHEDULES["zb_v"], SCHEDULES["interleaved_1f1b"]
    assert (v_shaped.num_devices(None, 4), v_shaped.num_stages(4)) == (4, 8)
    assert (v_shaped.num_devices(6, 4), any_number.num_devices(6, 4)) == (3, 3)
    assert (any_number.num_devices(None, 4), any_number.num_stages(4)) == (4, 8)
