"""Figures have an artist for every bar and span."""

import pytest

from layerwise_jax.cost.devices import H100
from layerwise_jax.schedule.generators import one_f_one_b
from layerwise_jax.schedule.timing import simulate_schedule
from layerwise_jax.simulate.comparison import compare_dense
from tests.render.test_html import plan

pytest.importorskip("matplotlib")


def test_a_plan_is_drawn_with_its_capacity():
    (axes,) = plan().plot().axes
    assert len(axes.patches) == 2 * 3
    assert [label.get_text() for label in axes.get_yticklabels()] == ["stage 0", "stage 1"]
    assert [line.get_xdata()[0] for line in axes.lines] == [20_480]
    assert not plan(capacity=None).plot().axes[0].lines


def test_schedules_and_simulations_are_drawn():
    schedule = one_f_one_b(2, 3)
    (axes,) = schedule.plot().axes
    assert len(axes.patches) == len(list(schedule.actions()))
    assert axes.get_xlabel() == "ticks"
    (axes,) = simulate_schedule(schedule, 1, 2).plot().axes
    assert axes.get_xlim() == (0, 12)
    assert axes.get_xlabel() == "seconds"


def test_a_comparison_is_drawn_by_bottleneck():
    found = compare_dense(H100, 4)
    (axes,) = found.plot().axes
    names = [text.get_text() for text in axes.figure.legends[0].get_texts()]
    assert names == ["memory", "cache", "arithmetic", "links", "latency"]


def test_figures_are_saved(tmp_path):
    plan().plot().savefig(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 1000
