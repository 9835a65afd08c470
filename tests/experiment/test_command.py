"""Command line of the experiments: help without work, output folders, tables of 80 columns."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
from absl import app, flags
from absl.testing import flagsaver
from rich.console import Console

from experiments import command
from experiments.dense16 import names as dense16
from experiments.dense16.strategies import MAKERS
from experiments.grid import Grid
from experiments.plan_without_gpu import names as plan_without_gpu
from experiments.plan_without_gpu.subjects import SUBJECTS as PLAN_SUBJECTS
from experiments.training import names as training
from experiments.training.subjects import SUBJECTS as TRAINING_SUBJECTS
from tests.support.paths import ROOT

# Commands, and a flag that the help of each lists.
COMMANDS = {
    "experiments.calibrate": "--smallest_mib",
    "experiments.dense16": "--measure",
    "experiments.multihost": "--kills",
    "experiments.multihost.worker": "--coordinator",
    "experiments.partition": "--parts",
    "experiments.plan_without_gpu": "--models",
    "experiments.quickstart": "--stages",
    "experiments.training": "--memory_microbatches",
    "experiments.training.fifty_steps": "--steps",
}
# Their flags need modules that import JAX.
COMMANDS_WITH_JAX = {
    "experiments.plan_without_gpu.against_device": "--absent",
    "experiments.training.gpu": "--preset",
    "experiments.training.gpu_report": "--results",
}
RUN_WITHOUT_JAX = """
import runpy, sys
sys.path.insert(0, {root!r})
sys.modules["jax"] = None  # importing it fails
sys.argv = ["program", "--helpshort"]
runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("module", COMMANDS)
def test_help_lists_flags_without_importing_jax(module: str, tmp_path: Path) -> None:
    script = RUN_WITHOUT_JAX.format(root=str(ROOT), module=module)
    ran = run(tmp_path, "-c", script)
    assert COMMANDS[module] in ran.stdout, ran.stderr
    assert ran.returncode == 1, "absl exits with 1 after help"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("module", COMMANDS_WITH_JAX)
def test_help_starts_no_work(module: str, tmp_path: Path) -> None:
    script = RUN_WITHOUT_JAX.replace('sys.modules["jax"] = None', "")
    ran = run(tmp_path, "-c", script.format(root=str(ROOT), module=module))
    assert COMMANDS_WITH_JAX[module] in ran.stdout, ran.stderr
    assert ran.returncode == 1
    assert list(tmp_path.iterdir()) == []


def test_every_program_is_listed_with_its_command() -> None:
    programs = {
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        for path in (ROOT / "experiments").rglob("*.py")
        if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")
    }
    programs = {name.removesuffix(".__main__") for name in programs}
    # JaxPP runs in its own environment and takes its arguments from `experiments.training`.
    programs -= {"experiments.training.jaxpp_rival", "experiments.training.flax_users"}
    assert programs == {*COMMANDS, *COMMANDS_WITH_JAX}
    page = (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
    assert [name for name in programs if f"`python -m {name}`" not in page] == []


def test_names_of_the_options_are_those_of_the_programs() -> None:
    assert (*MAKERS,) == dense16.STRATEGIES
    assert {*PLAN_SUBJECTS, plan_without_gpu.LARGE} == {*plan_without_gpu.MODELS}
    assert {*TRAINING_SUBJECTS} == {*training.SUBJECTS}


@pytest.fixture
def parsed() -> None:
    flags.FLAGS(["program"])


def test_results_go_to_the_build_folder(
    parsed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    output = command.output("dense16")
    assert output.folder.resolve() == tmp_path / "build" / "dense16"
    committed = ROOT / "experiments" / "dense16"
    assert output.page.read_text() == (committed / "README.md").read_text()
    assert output.results()["h200x2"] == committed / "results" / "h200x2.json"
    (output.folder / "h200x2.json").write_text("{}")
    assert output.results()["h200x2"] == output.folder / "h200x2.json"


@pytest.mark.parametrize("source", ["experiments/dense16/results", "layerwise_jax", "docs/new"])
def test_results_in_the_source_tree_need_a_flag(parsed: None, source: str) -> None:
    with (
        flagsaver.flagsaver((command.OUT, str(ROOT / source))),
        pytest.raises(app.UsageError, match="outside of the source tree"),
    ):
        command.output("dense16")


def test_update_results_selects_the_committed_ones(parsed: None) -> None:
    home = ROOT / "experiments" / "dense16"
    with flagsaver.flagsaver((command.UPDATE_RESULTS, True)):
        output = command.output("dense16")
    assert (output.folder, output.page) == (home / "results", home / "README.md")
    with (
        flagsaver.flagsaver((command.UPDATE_RESULTS, True), (command.OUT, "elsewhere")),
        pytest.raises(app.UsageError, match="leave out --out"),
    ):
        command.output("dense16")


def test_brackets_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    command.make_console().print("pip install 'layerwise-jax[aot]'")
    assert "'layerwise-jax[aot]'" in capsys.readouterr().out


def test_arguments_are_refused() -> None:
    with pytest.raises(app.UsageError, match=r"must be flags .* got \['8'\]"):
        command.refuse_arguments(["program", "8"])


@pytest.mark.parametrize("columns", [3, 14])
def test_grids_fit_80_columns(columns: int) -> None:
    names = [f"a long name of column {j}" for j in range(columns)]
    grid = Grid("Title", names, [[f"cell {i}.{j}" for j in range(columns)] for i in range(2)])
    out = io.StringIO()
    grid.show(Console(file=out, width=80))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    for shown in (*names[1:], "cell 1.2", "cell 0.0"):
        assert shown in " ".join(text.split())
