"""experiments/training at toy size: consistent figures, and a page made from them."""

import json
from pathlib import Path

import pytest

from experiments.command import Output
from experiments.page import update_page
from experiments.training import flax_users, memory, step_time
from experiments.training.closed_forms import compare_with_closed_forms
from experiments.training.problems import resnet_problem, train_both
from experiments.training.report import report, write_results
from experiments.training.staging import DIFFERENTIATED, SCHEDULED
from experiments.training.subjects import SUBJECTS, mlp
from tests.support.paths import ROOT

BY_NAME = {way.name: way for way in SCHEDULED}


@pytest.fixture
def few_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs to compile in seconds: no more models and ways of training than tell one from
    another.
    """
    monkeypatch.setattr(
        memory, "subjects", lambda num_blocks: {"equal": lambda _: mlp([64] * num_blocks)}
    )
    monkeypatch.setattr(memory, "WAYS", (DIFFERENTIATED, BY_NAME["1F1B"]))
    monkeypatch.setattr(step_time, "WAYS", (DIFFERENTIATED, BY_NAME["1F1B, stored"]))


def test_memory_of_a_scheduled_step_is_flat_and_that_of_a_differentiated_one_is_not(
    few_ways: None,
) -> None:
    done: list[str] = []
    figures = memory.measure_memory(2, [4, 16], done.append)
    assert len(done) == 2 * 2
    for found in figures["stages"].values():
        scheduled, differentiated = (
            memory.growth(found["ways"][way.name]) for way in memory.WAYS[::-1]
        )
        assert scheduled is not None
        assert scheduled < 0.05
        assert differentiated is not None
        assert differentiated > 0.5


def test_all_programs_of_a_subject_train_alike(few_ways: None) -> None:
    figures = step_time.measure_subject("small", 2, 4, 2, None, lambda _: None)
    assert figures["rival"] is None
    assert set(figures["programs"]) == {
        "unstaged",
        "accumulating",
        *(way.name for way in step_time.WAYS),
    }
    wanted = figures["programs"]["unstaged"]["losses"]
    assert wanted[-1] < wanted[0]
    for program in figures["programs"].values():
        assert program["losses"] == pytest.approx(wanted, rel=1e-5)
        assert len(program["cpu_seconds"]) == 2


def test_simulated_schedules_have_the_makespans_and_stashes_of_the_closed_forms() -> None:
    for found in compare_with_closed_forms(4, 8)["schedules"].values():
        for quantity, wanted in found["expected"].items():
            assert wanted is None or found[quantity] == wanted


@pytest.mark.slow
def test_staged_and_unstaged_runs_with_batch_norm_agree() -> None:
    run = train_both(resnet_problem(), 3, lambda: None)
    assert run["most_apart"] < 1e-4
    assert run["staged"][0] != run["staged"][-1]


def test_the_page_is_filled_from_results(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- schedules -->\nstale\n<!-- end of schedules -->\nafter\n")
    write_results(tmp_path, "schedules", compare_with_closed_forms(2, 3))
    assert report(Output(tmp_path, tmp_path, page)) == ["schedules"]
    text = page.read_text()
    assert "stale" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| GPipe | 12 s | 12 s |" in text
    assert (tmp_path / "schedules.png").stat().st_size > 0
    assert json.loads((tmp_path / "schedules.json").read_text())["microbatches"] == 3


def test_a_page_without_marks_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("nothing here\n")
    with pytest.raises(ValueError, match="must have the marks '<!-- memory -->'"):
        update_page(page, {"memory": "| |"})


def test_the_committed_page_is_what_the_committed_results_say(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    committed = ROOT / "experiments" / "training"
    text = (committed / "README.md").read_text(encoding="utf-8")
    page.write_text(text, encoding="utf-8")
    report(Output(tmp_path, committed / "results", page))
    assert page.read_text(encoding="utf-8") == text


def test_subjects_are_cut_between_equal_counts_of_blocks() -> None:
    subject = SUBJECTS["small"]()
    assert subject.last_blocks(2) == ("block_1",)
    with pytest.raises(ValueError, match="divisor of the 4 blocks, got 3"):
        subject.last_blocks(3)


def test_flax_users_get_the_unstaged_losses() -> None:
    for staged, unstaged in flax_users.compare(num_stages=2).values():
        assert staged == pytest.approx(unstaged, rel=flax_users.TOLERANCE)
