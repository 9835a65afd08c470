"""Sizes of microbatches, chosen from tables of times, are the best of all profiles."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise_jax.schedule.deferral import defer
from layerwise_jax.schedule.generators import one_f_one_b, zero_bubble
from layerwise_jax.schedule.sizes import SizeSearch, SizeTimes, choose_sizes
from layerwise_jax.schedule.timing import simulate_schedule


def linear(size, stages, overhead=0.0):
    """A second an example and stage forward, two backward."""
    return SizeTimes([size + overhead] * stages, [2 * size + overhead] * stages)


def generate(stages):
    return lambda count: one_f_one_b(stages, count)


def test_small_microbatches_first_and_last_shorten_ramp_and_drain():
    times = {size: linear(size, 2, overhead=0.4) for size in (1, 2, 4)}
    found = choose_sizes(SizeSearch(16, times, generate(2), deferrals=(0,)))
    assert found.is_proved
    assert found.equal is not None
    assert len(set(found.equal.sizes)) == 1
    assert found.seconds < found.equal.seconds
    assert found.sizes[0] < max(found.sizes)
    assert sum(found.sizes) == 16
    assert "faster than" in str(found)


def test_without_a_pipeline_or_an_overhead_there_is_nothing_to_gain():
    times = {size: linear(size, 1, overhead=1.0) for size in (2, 4)}
    found = choose_sizes(SizeSearch(8, times, generate(1), deferrals=(0,)))
    assert found.sizes == (4, 4)
    assert found.equal is not None
    assert found.seconds == found.equal.seconds == 2 * (4 + 1 + 8 + 1)


def test_sizes_without_times_are_not_used_and_times_are_not_interpolated():
    # Six examples are slower than eight: no size in between may be assumed.
    times = {2: linear(2, 2), 6: linear(20, 2), 8: linear(8, 2)}
    found = choose_sizes(SizeSearch(16, times, generate(2)))
    assert set(found.sizes) <= {2, 8}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_choice_is_the_best_of_all_profiles(data):
    stages, examples = data.draw(st.integers(1, 3)), data.draw(st.integers(4, 9))
    seconds = st.integers(1, 9)
    rows = st.lists(seconds, min_size=stages, max_size=stages)
    sizes = data.draw(st.sets(st.integers(1, 4), min_size=1, max_size=3))
    times = {
        size: SizeTimes(data.draw(rows), [2 * each for each in data.draw(rows)]) for size in sizes
    }
    deferrals = (0, 1)
    search = SizeSearch(
        examples, times, generate(stages), longest_ramp=2, most_sizes=3, deferrals=deferrals
    )
    best = np.inf
    for count in range(1, examples + 1):
        for profile in product(sizes, repeat=count):
            if sum(profile) == examples and is_profile(profile, 2):
                for deferred in deferrals:
                    best = min(best, seconds_of(profile, deferred, times, stages))
    if best == np.inf:
        with pytest.raises(ValueError, match=f"add up to {examples} examples"):
            choose_sizes(search)
    else:
        found = choose_sizes(search)
        assert found.is_proved
        assert found.seconds == pytest.approx(best)
        assert seconds_of(found.sizes, found.deferred, times, stages) == found.seconds


def is_profile(sizes, longest):
    """A ramp and a drain of at most `longest` around a plateau of the largest size."""
    top = max(sizes)
    first = sizes.index(top)
    last = len(sizes) - sizes[::-1].index(top)
    ramp, plateau, drain = sizes[:first], sizes[first:last], sizes[last:]
    return (
        list(ramp) == sorted(ramp)
        and list(drain) == sorted(drain, reverse=True)
        and set(plateau) == {top}
        and max(len(ramp), len(drain)) <= longest
    )


def seconds_of(sizes, deferred, times, stages):
    schedule = one_f_one_b(stages, len(sizes))
    if deferred > len(sizes):
        return np.inf
    forward, backward = (
        np.array([getattr(times[size], name) for size in sizes]).T
        for name in ("forward", "backward")
    )
    return simulate_schedule(defer(schedule, deferred), forward, backward).makespan


def test_memory_is_a_hard_constraint():
    times = {size: linear(size, 2, overhead=1.0) for size in (1, 2, 4)}

    def fits(sizes, schedule):
        return max(schedule.peak_live_microbatches()) * max(sizes) <= 4

    found = choose_sizes(SizeSearch(8, times, generate(2), fits=fits))
    assert max(found.sizes) == 2
    with pytest.raises(ValueError, match="fit the memory"):
        choose_sizes(SizeSearch(8, times, generate(2), fits=lambda sizes, schedule: False))


def test_a_search_that_ends_early_says_so():
    times = {size: linear(size, 3, overhead=0.1) for size in (1, 2, 3)}
    search = SizeSearch(30, times, generate(3), most_simulations=2)
    found = choose_sizes(search)
    assert not found.is_proved
    assert sum(found.sizes) == 30


def test_schedules_without_whole_backwards_are_not_deferred():
    times = {2: linear(2, 2)}
    found = choose_sizes(SizeSearch(8, times, lambda count: zero_bubble(2, count)))
    assert (found.sizes, found.deferred) == ((2, 2, 2, 2), 0)


def test_what_is_no_search_is_refused():
    with pytest.raises(ValueError, match="equally many stages for each, got \\[1, 2\\]"):
        SizeSearch(4, {1: linear(1, 1), 2: linear(2, 2)}, generate(2))
    with pytest.raises(ValueError, match="backward must have 1 entries"):
        SizeTimes([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="num_examples must be"):
        SizeSearch(0, {1: linear(1, 1)}, generate(1))
