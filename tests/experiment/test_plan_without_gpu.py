"""experiments/plan_without_gpu: plans in bounded time, and a page that shows the results."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.plan_without_gpu.against_device import COMMITTED_ABSENT, RESULTS, guarded, read
from experiments.plan_without_gpu.stages import stage_programs
from experiments.plan_without_gpu.table import comparison_table, large_table, plans_table
from layerwise_jax.cost.devices import H100
from layerwise_jax.plan import Plan
from layerwise_jax.xla.aot import can_compile_for_absent_gpus

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "experiments" / "plan_without_gpu" / "README.md"
MAX_BYTES = 2**30

needs_plugin = pytest.mark.skipif(
    not can_compile_for_absent_gpus(), reason="the CUDA plugin (extra aot) is not importable"
)


def run(folder: Path, *models: str) -> str:
    """Run the experiment in a process of its own, whose memory it measures."""
    command = [sys.executable, "-m", "experiments.plan_without_gpu", f"--out={folder}"]
    command += [f"--models={model}" for model in models]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_plugin
def test_a_small_model_from_end_to_end(tmp_path: Path) -> None:
    printed = run(tmp_path, "small")
    (figures,) = json.loads((tmp_path / "plans.json").read_text(encoding="utf-8"))
    plan = Plan.from_json(json.dumps(figures["plan"]))
    assert str(plan) in printed
    assert f"XLA:GPU for {H100.name}, which is not here" in plan.measured_on
    # Four microbatches fill two stages.
    assert (plan.num_stages, plan.num_microbatches, plan.capacity) == (2, 4, H100.usable_l2_bytes)
    for stage in plan.stages:
        assert stage.compiled_bytes is not None
        assert stage.weight_bytes < stage.compiled_bytes <= H100.usable_l2_bytes
    # In half precision, the tied embedding on both stages.
    weights = sum(stage.weight_bytes for stage in plan.stages)
    assert weights == 2 * (figures["parameters"] + 256 * 64)
    assert (tmp_path / "small.png").read_bytes().startswith(b"\x89PNG")


@needs_plugin
def test_175_billion_parameters_are_planned_for_1024_gpus_in_a_gigabyte(
    tmp_path: Path,
) -> None:
    printed = run(tmp_path, "large")
    figures = json.loads((tmp_path / "large.json").read_text(encoding="utf-8"))
    assert figures["parameters"] == pytest.approx(175e9, rel=0.01)
    assert (figures["layers"], figures["layers_compiled"]) == (99, 4)
    assert "4 programs compiled for layers" in printed
    assert figures["sizes_from"] == f"XLA:GPU for {H100.name}, which is not here"
    assert [plan["devices"] for plan in figures["plans"]] == [16, 64, 1024]
    for plan in figures["plans"]:
        assert plan["stages"] * plan["replicas"] == plan["devices"]
        assert plan["gap"] == 0
        assert len(plan["streaming"]) == plan["stages"]
        assert (
            plan["largest_stage_weight_bytes"]
            < plan["largest_stage_compiled_bytes"]
            < plan["largest_stage_bytes"]
        )
    assert figures["peak_memory_bytes"] < MAX_BYTES


def test_tables_of_the_page_are_those_of_the_results() -> None:
    page = PAGE.read_text(encoding="utf-8")
    tables = {"plans": plans_table, "large": large_table, "against_device": comparison_table}
    for name, table in tables.items():
        text = table(read(RESULTS / f"{name}.json")).markdown() + "\n"
        assert text == (RESULTS / f"{name}.md").read_text(encoding="utf-8")
        assert text in page


def test_every_stage_was_compared() -> None:
    names = {stage.name for stage in stage_programs()}
    assert len(names) == 14
    figures = read(RESULTS / "against_device.json")
    assert names == set(figures["real"]["programs"]) == set(figures["absent"]["programs"])
    assert names == set(read(COMMITTED_ABSENT)["programs"])
    for name in names:
        absent, real = (figures[half]["programs"][name]["default"] for half in ("absent", "real"))
        assert (absent["argument_bytes"], absent["output_bytes"]) == (
            real["argument_bytes"],
            real["output_bytes"],
        )


def test_one_stage_s_failure_is_reported_in_its_place() -> None:
    def fails() -> dict[str, int]:
        raise RuntimeError("no such kernel\nand more")

    far, past = float("inf"), float("-inf")
    assert guarded(fails, far) == {"error": "RuntimeError: no such kernel"}
    assert guarded(lambda: {"temp_bytes": 1}, past) == {"error": "no time was left"}
    programs = {"absent": {"a": {"default": {"error": "reason"}}}, "real": {"a": {}}}
    halves = {half: {"device": "d", "jax": "j", "programs": programs[half]} for half in programs}
    assert "| a | reason |" in comparison_table(halves).markdown()
