"""Columns: what each device does in a step, in order."""

from collections.abc import Sequence

import pytest

from layerwise_jax.schedule.columns import Column, StageTraits, forward_columns, in_one_thread
from layerwise_jax.schedule.columns import lay_out_columns as lay_out
from layerwise_jax.schedule.generators import gpipe, one_f_one_b, zero_bubble
from layerwise_jax.schedule.registry import SCHEDULES, make_schedule
from layerwise_jax.schedule.table import Schedule, ScheduleError

FIRST = StageTraits(sends=True, has_state=False, has_backward=True, has_products=True)
LAST = StageTraits(sends=False, has_state=False, has_backward=True, has_products=True)


def text(columns: Sequence[Column]) -> list[str]:
    return [" ".join(map(str, column)) for column in columns]


def test_forward_and_backward_of_the_last_stage_are_one_step() -> None:
    columns = lay_out(one_f_one_b(2, 3, paired=True), [FIRST, LAST])
    assert text(columns) == [
        "0F0 0F1 0F2 0B0 0B1 0B2",
        "1F0+1B0 1F1+1B1 1F2+1B2",
    ]


def test_they_are_two_where_other_work_comes_between() -> None:
    assert text(lay_out(gpipe(2, 2), [FIRST, LAST]))[1] == "1F0 1F1 1B0 1B1"


def test_steps_without_a_result_are_left_out() -> None:
    frozen = StageTraits(sends=True, has_state=False, has_backward=False, has_products=False)
    columns = lay_out(one_f_one_b(2, 2), [frozen, LAST])
    assert text(columns)[0] == "0F0 0F1"


def test_halves_are_kept_as_far_as_they_have_a_result() -> None:
    columns = lay_out(zero_bubble(2, 2), [FIRST, LAST])
    assert text(columns)[0].count("I") == text(columns)[0].count("W") == 2
    plain = StageTraits(sends=True, has_state=False, has_backward=True, has_products=False)
    columns = lay_out(zero_bubble(2, 2), [plain, LAST])
    assert text(columns)[0].count("I") == 2
    assert "W" not in text(columns)[0]


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_one_thread_can_run_all_columns(name: str) -> None:
    """Whatever a step reads was sent by one before it."""
    num_stages = 4 if SCHEDULES[name].stages_per_device == 1 else 8
    schedule = make_schedule(name, num_stages, 8, 4)
    traits = [*[FIRST] * (num_stages - 1), LAST]
    forward: set[tuple[int, int]] = set()
    backward: set[tuple[int, int]] = set()
    steps = in_one_thread(lay_out(schedule, traits))
    for _, (_, stage, kind, microbatch) in steps:
        if kind in ("F", "FB"):
            assert stage == 0 or (stage - 1, microbatch) in forward
            forward.add((stage, microbatch))
        if kind in ("B", "I", "FB"):
            assert stage == num_stages - 1 or (stage + 1, microbatch) in backward
            assert (stage, microbatch) in forward
            backward.add((stage, microbatch))
    assert len(forward) == len(backward) == num_stages * 8


def test_forwards_alone() -> None:
    assert text(forward_columns(one_f_one_b(2, 2))) == ["0F0 0F1", "1F0 1F1"]


def test_state_asks_for_the_order_of_microbatches() -> None:
    stateful = StageTraits(sends=False, has_state=True, has_backward=True, has_products=False)
    with pytest.raises(ScheduleError, match="0F0 after 0F1"):
        lay_out(Schedule.parse("0F1\n0F0\n0B1\n0B0"), [stateful])
