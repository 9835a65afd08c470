"""HTML is well formed, self-contained and escaped, and shows every stage, span and strategy."""

import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from layerwise_jax.cost.devices import H100
from layerwise_jax.cost.layer_cost import LayerCost
from layerwise_jax.partition.solver import partition_layers
from layerwise_jax.plan import LoopFigures, Plan, Sizes, make_plan
from layerwise_jax.render.bars import Bar, Bars, Segment
from layerwise_jax.render.html import CHART_WIDTH, LABEL_WIDTH, bars_html, page, table_html
from layerwise_jax.schedule.generators import one_f_one_b
from layerwise_jax.schedule.timing import simulate_schedule
from layerwise_jax.simulate.comparison import compare_dense

VOID = {"meta", "line", "br"}


class Reader(HTMLParser):
    """Collects elements, checks that they nest, and keeps the text of titles and cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.texts[self.open[-1]][-1] += data

    def named(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def plan(capacity=20_480) -> Plan:
    costs = (
        LayerCost("embed<script>", 6144, 1024, 0),
        *(LayerCost(f"blocks/{i}", 2048, 1024, 1024) for i in range(4)),
    )
    sizes = Sizes(costs, "a device", "its compiler", capacity, residency="Not resident: stage 0.")
    loop = {"num_devices": 2, "num_microbatches": 4, "num_ticks": 5, "common_layers": 1}
    return make_plan(
        partition_layers(costs, 2),
        sizes,
        LoopFigures(send_bytes=[768, 0], padding_bytes=0, has_branch=False, **loop),
    )


def test_bars_have_a_part_for_every_segment_and_a_line_at_the_limit():
    bars = [
        Bar("one", (Segment("a", 30), Segment("b", 10)), "more of it"),
        Bar("two", (Segment("a", 20), Segment("b", 0))),
    ]
    chart = Bars(bars, "{:g} B".format, limit=80, limit_name="cap")
    read = Reader(bars_html(chart))
    widths = [float(rect["width"]) for rect in read.named("rect")]
    assert widths == [CHART_WIDTH * part / 80 for part in (30, 10, 20, 0)]
    (line,) = read.named("line")
    assert float(line["x1"]) == LABEL_WIDTH + CHART_WIDTH
    assert read.texts["title"][:2] == [
        "one: 40 B; a 30 B; b 10 B; more of it",
        "two: 20 B; a 20 B; b 0 B",
    ]
    assert "cap 80 B" in read.texts["title"]


def test_a_plan_shows_what_is_not_resident_every_stage_and_its_notes():
    text = plan()._repr_html_()
    read = Reader(text)
    assert read.texts["p"][0] == "Not resident: stage 0."
    assert len(read.named("rect")) == 2 * 3
    assert read.texts["title"][0].startswith("stage 0: ")
    assert "weights" in read.texts["title"][0]
    assert "sends 768 B" in read.texts["title"][0]
    assert any(each.startswith("note: ") for each in read.texts["p"])


def test_names_are_escaped():
    text = plan()._repr_html_()
    assert "<script>" not in text
    assert "embed&lt;script&gt;" in text
    assert "<b>" not in table_html(["<b>"], [["<b>"]])
    assert "<b>" not in page("<b>", [("<b>", "")])


@pytest.mark.parametrize("paired", [False, True])
def test_a_schedule_shows_every_action_once(paired):
    schedule = one_f_one_b(2, 3, paired)
    read = Reader(schedule._repr_html_())
    actions = [str(action) for _, _, action in schedule.actions()]
    assert sorted(title.split(",")[0] for title in read.texts["title"]) == sorted(actions)
    # All ticks fill the width.
    right = max(float(rect["x"]) + float(rect["width"]) for rect in read.named("rect"))
    assert right == pytest.approx(LABEL_WIDTH + CHART_WIDTH, abs=0.1)


def test_a_simulation_shows_seconds():
    text = simulate_schedule(one_f_one_b(2, 2), 1e-3, 2e-3)._repr_html_()
    titles = Reader(text).texts["title"]
    assert "0F0, forward: 0 us to 1 ms" in titles
    assert "makespan 9 ms, bubble 33.3%" in text


def test_a_partition_shows_loads_and_the_lower_bound():
    costs = [LayerCost(str(i), 2048, 0, 0) for i in range(4)]
    read = Reader(partition_layers(costs, 2)._repr_html_())
    assert len(read.named("rect")) == 2
    assert len(read.named("line")) == 1
    assert any("layers 0..1" in title for title in read.texts["title"])


def test_a_comparison_shows_every_strategy_that_fits():
    found = compare_dense(H100, 8)
    read = Reader(found._repr_html_())
    fitting = [row for row in found.rows if row.fits_memory]
    assert len(read.named("g")) == len(fitting)
    assert found.advice in read.texts["p"]


def report(path: Path) -> str:
    schedule = simulate_schedule(one_f_one_b(2, 4), 1, 2)
    plan().save_html(path, schedule=schedule, comparison=compare_dense(H100, 4))
    return path.read_text(encoding="utf-8")


def test_a_report_is_one_self_contained_file(tmp_path):
    text = report(tmp_path / "plan.html")
    read = Reader(text)
    assert text.startswith("<!DOCTYPE html>")
    assert read.texts["h2"] == ["Memory", "Stages", "Timeline", "Strategies"]
    for tag in ("script", "link", "img", "iframe"):
        assert read.named(tag) == []
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    plan().save_html(tmp_path / "short.html")
    short = Reader((tmp_path / "short.html").read_text(encoding="utf-8"))
    assert short.texts["h2"] == ["Memory", "Stages"]


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_browser_opens_the_report(tmp_path):
    report(tmp_path / "plan.html")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--dump-dom", str(tmp_path / "plan.html")]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "Strategies" in shown
    assert shown.count("<rect") > 20
