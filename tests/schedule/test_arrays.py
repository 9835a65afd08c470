"""The tables of the compiled loop bring every action its own data, in as few slots as can be."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise_jax.schedule.arrays import BACKWARD_KINDS, lower_schedule, stash_slots
from layerwise_jax.schedule.generators import forward_only, one_f_one_b
from layerwise_jax.schedule.table import Action, Schedule, ScheduleError
from tests.support.schedule_cases import properties, ring_schedules, schedules


@properties
@given(schedules())
def test_stash_slots_are_disjoint_and_no_more_than_needed(schedule):
    slots = stash_slots(schedule)
    for device, peak in enumerate(schedule.peak_live_microbatches()):
        on_device = {
            pair: slot
            for pair, slot in slots.items()
            if schedule.device_of_stage[pair[0]] == device
        }
        assert sorted(set(on_device.values())) == list(range(peak))
        held = set()
        for pair, slot in on_device.items():
            first, last = schedule.lifetimes[pair]
            cells = {(slot, tick) for tick in range(first, last + 1)}
            assert not cells & held
            held |= cells


@properties
@given(ring_schedules())
def test_tables_bring_every_action_its_own_data(schedule):
    done = replay(lower_schedule(schedule), schedule.num_devices, schedule.num_stages)
    assert done == [(tick, device, action) for tick, device, action in schedule.actions()]


@properties
@given(ring_schedules(), st.data())
def test_a_table_with_two_ticks_exchanged_is_refused_or_still_moves_the_right_data(schedule, data):
    rows = list(schedule.ticks)
    one, other = (data.draw(st.integers(0, len(rows) - 1)) for _ in range(2))
    rows[one], rows[other] = rows[other], rows[one]
    exchanged = Schedule(tuple(rows))
    try:
        arrays = lower_schedule(exchanged)
    except ScheduleError:
        assert one != other
    else:
        assert replay(arrays, schedule.num_devices, schedule.num_stages) == list(
            exchanged.actions()
        )


def replay(arrays, num_devices, num_stages):
    """Performs the tables on tokens instead of arrays; every read asserts that the slot holds the
    token meant.
    """
    stash = np.full((num_devices, arrays.num_stash_slots), None)
    activations = np.full((num_devices, arrays.num_activation_slots), None)
    gradients = np.full((num_devices, arrays.num_gradient_slots), None)
    results, input_gradients = [None] * num_devices, [None] * num_devices
    done = []
    for tick in range(len(arrays.forward_microbatch)):
        sent_forward, sent_backward = results, input_gradients
        results, input_gradients = [None] * num_devices, [None] * num_devices
        for device in range(num_devices):
            at = tick, device
            if arrays.activation_arrival[at] >= 0:
                activations[device, arrays.activation_arrival[at]] = sent_forward[device - 1]
            if arrays.gradient_arrival[at] >= 0:
                gradients[device, arrays.gradient_arrival[at]] = sent_backward[
                    (device + 1) % num_devices
                ]
            if (microbatch := arrays.forward_microbatch[at]) >= 0:
                stage = arrays.forward_chunk[at] * num_devices + device
                if stage > 0:
                    assert activations[device, arrays.activation_read[at]] == (
                        "activation",
                        stage,
                        microbatch,
                    )
                if arrays.stash_write[at] >= 0:
                    stash[device, arrays.stash_write[at]] = ("stash", stage, microbatch)
                results[device] = ("activation", stage + 1, microbatch)
                done.append((tick, device, Action(stage, "F", microbatch)))
            if (microbatch := arrays.backward_microbatch[at]) >= 0:
                stage = arrays.backward_chunk[at] * num_devices + device
                kind = BACKWARD_KINDS[arrays.backward_kind[at]]
                assert stash[device, arrays.stash_read[at]] == ("stash", stage, microbatch)
                if stage + 1 < num_stages:
                    assert gradients[device, arrays.gradient_read[at]] == (
                        "gradient",
                        stage,
                        microbatch,
                    )
                if kind != "W":
                    input_gradients[device] = ("gradient", stage - 1, microbatch)
                done.append((tick, device, Action(stage, kind, microbatch)))
    return done


def test_tables_are_int32_of_ticks_by_devices_and_need_few_slots():
    schedule = one_f_one_b(4, 16, paired=True)
    arrays = lower_schedule(schedule)
    assert arrays.forward_microbatch.shape == (schedule.num_ticks, 4)
    assert arrays.forward_microbatch.dtype == np.int32
    # In pairs every message is used in the tick of its arrival.
    assert (arrays.num_stash_slots, arrays.num_activation_slots, arrays.num_gradient_slots) == (
        7,
        1,
        1,
    )


def test_tables_hold_minus_one_where_there_is_nothing():
    arrays = lower_schedule(forward_only(2, 2))
    np.testing.assert_array_equal(arrays.forward_microbatch, [[0, -1], [1, 0], [-1, 1]])
    np.testing.assert_array_equal(arrays.activation_arrival, [[-1, -1], [-1, 0], [-1, 0]])
    for name, tick in product(
        ("backward_microbatch", "backward_kind", "stash_write", "gradient_read"), range(3)
    ):
        assert (getattr(arrays, name)[tick] == -1).all()
    assert arrays.num_stash_slots == 0


def test_tables_refuse_stages_that_are_not_in_a_ring():
    with pytest.raises(ValueError, match=r"must place stage 2 on device 0 of 2 .* got device 1"):
        lower_schedule(Schedule.parse("0F0 .\n. 1F0\n. 2F0"))
