"""The picture and the trace of a schedule show what the simulation says."""

import json

import pytest

from layerwise_jax.schedule.generators import forward_only, one_f_one_b, zero_bubble
from layerwise_jax.schedule.picture import NAMES, draw_timeline, trace_events, write_trace
from layerwise_jax.schedule.timing import simulate_schedule


@pytest.fixture
def axes():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    return figure.subplots()


def test_a_bar_stands_where_its_action_ran(axes):
    simulation = simulate_schedule(zero_bubble(3, 4), 1.0, 2.0)
    assert draw_timeline(simulation, axes) is axes
    assert len(axes.patches) == len(simulation.spans)
    for bar, text, (action, device, start, end) in zip(
        axes.patches, axes.texts, simulation.spans, strict=True
    ):
        assert (bar.get_x(), bar.get_width()) == (start, end - start)
        assert bar.get_y() + bar.get_height() / 2 == pytest.approx(device)
        assert text.get_text() == str(action)


def test_the_picture_names_devices_and_only_the_kinds_that_it_shows(axes):
    draw_timeline(simulate_schedule(forward_only(2, 3), 1.0, 0.0), axes)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["device 0", "device 1"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [NAMES["F"]]
    assert axes.get_title() == "makespan 4 s, bubble 25.0%"


def test_a_picture_of_its_own_is_as_wide_as_the_schedule_is_long():
    plt = pytest.importorskip("matplotlib.pyplot")
    widths = []
    for num_microbatches in (2, 8):
        axes = draw_timeline(simulate_schedule(one_f_one_b(2, num_microbatches), 1.0, 2.0))
        widths.append(axes.figure.get_figwidth())
        plt.close(axes.figure)
    assert widths[0] < widths[1]


def test_a_trace_has_every_action_with_its_times_in_microseconds(tmp_path):
    simulation = simulate_schedule(one_f_one_b(2, 3), 1e-3, 2e-3, link_seconds=1e-4)
    write_trace(simulation, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    assert [(event["name"], event["tid"]) for event in slices] == [
        (str(s.action), s.device) for s in simulation.spans
    ]
    assert slices[0] == {
        "ph": "X",
        "name": "0F0",
        "cat": "forward",
        "pid": 0,
        "tid": 0,
        "ts": 0.0,
        "dur": 1e3,
        "args": {"stage": 0, "microbatch": 0},
    }
    assert max(event["ts"] + event["dur"] for event in slices) == pytest.approx(
        simulation.makespan * 1e6
    )
    assert {event["args"]["name"] for event in events if event["ph"] == "M"} == {
        "device 0",
        "device 1",
    }


def test_the_counters_of_a_trace_end_at_zero_and_peak_at_the_live_microbatches():
    simulation = simulate_schedule(zero_bubble(4, 9), 1.0, 2.0)
    counters = [event for event in trace_events(simulation)["traceEvents"] if event["ph"] == "C"]
    for device, peak in enumerate(simulation.peak_live_microbatches):
        live = [event["args"]["live"] for event in counters if event["tid"] == device]
        assert max(live) == peak
        assert live[-1] == 0


def test_a_schedule_without_backward_has_no_counters():
    events = trace_events(simulate_schedule(forward_only(2, 2), 1.0, 0.0))["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X"}
