"""The README's code runs and prints what it says; the quickstart's parts do what its page
claims.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from absl import app, flags
from absl.testing import flagsaver

import layerwise_jax as lw
from experiments.models.gpt import GPT, next_token_loss
from experiments.quickstart import __main__ as quickstart
from experiments.quickstart.picture import draw
from experiments.quickstart.prose import docstrings, draw_batches, read_prose
from experiments.quickstart.training import Losses, Run, compare, largest_difference, train_both

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# What the compiler allocates, and what follows from it, may differ between versions of JAX; these
# columns may not.
STABLE_COLUMNS = {"stage", "layers", "weights", "activations", "sends"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def stable_cells(table: str) -> list[list[str]]:
    """The rows of a printed plan, without the columns that depend on the compiler."""
    rows = [
        [cell.strip() for cell in re.split("[│┃]", line)]
        for line in table.splitlines()
        if re.search("[│┃]", line)
    ]
    kept = [i for i, name in enumerate(rows[0]) if name in STABLE_COLUMNS]
    assert len(kept) == len(STABLE_COLUMNS)
    return [[row[i] for i in kept] for row in rows]


def python(*arguments: str) -> subprocess.CompletedProcess:
    """Run Python at the root of the repository; programs compile in less time, since speed is not
    what is tested.
    """
    lightly = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        env=lightly,
    )


def test_readme_runs_and_prints_its_plan():
    ran = python("-c", "\n".join(blocks("python")))
    assert ran.returncode == 0, ran.stderr
    (printed,) = blocks("text")
    assert stable_cells(ran.stdout) == stable_cells(printed)


def test_readme_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_build_page_names_every_folder_and_top_module():
    page = (ROOT / "BUILD.md").read_text(encoding="utf-8")
    named = {name for row in re.findall(r"^\| (`.*?) \|", page, re.M) for name in row.split(", ")}
    package = ROOT / "layerwise_jax"
    folders = {f"`{path.parent.name}/`" for path in package.glob("*/__init__.py")}
    modules = {f"`{path.name}`" for path in package.glob("*.py") if path.stem != "__init__"}
    assert named == folders | modules


def test_prose_is_pages_then_docstrings():
    prose = read_prose(ROOT).decode()
    assert prose.startswith(README)
    assert "\n\n".join(docstrings(ROOT / "layerwise_jax" / "trace" / "program.py")) in prose
    assert "def flatten(" not in prose


def test_prose_needs_a_clone(tmp_path):
    with pytest.raises(ValueError, match=r"run this from a clone"):
        read_prose(tmp_path)


def test_batches_are_windows_of_the_text_and_repeat():
    text = bytes(range(100))
    batches = draw_batches(text, steps=3, batch=5, length=7)
    assert batches.shape == (3, 5, 7)
    assert (np.diff(batches) == 1).all()
    assert len(np.unique(batches[..., 0])) > 5
    np.testing.assert_array_equal(batches, draw_batches(text, steps=3, batch=5, length=7))
    assert (draw_batches(text, 1, 2, 100) == np.arange(100)).all()
    with pytest.raises(ValueError, match=r"100 bytes, a window 101"):
        draw_batches(text, 1, 1, 101)


def test_largest_difference_names_the_leaf_relative_to_its_largest_entry():
    wanted = {"small": np.array([0.0, 1e-3]), "large": np.array([100.0, 1.0])}
    came = {"small": np.array([1e-6, 1e-3]), "large": np.array([100.0, 1.001])}
    name, share = largest_difference(came, wanted)
    assert name == "small"
    assert share == pytest.approx(1e-3)
    assert largest_difference(wanted, wanted)[1] == 0
    assert largest_difference({"w": np.array([np.nan])}, {"w": np.ones(1)}) == ("w", np.inf)


def test_staged_and_unstaged_training_stay_together(tmp_path):
    model = GPT(vocabulary=256, width=16, depth=2, heads=2, context=8)
    batches = draw_batches(README.encode(), steps=4, batch=4, length=model.context + 1)
    params = jax.jit(model.init)(jax.random.key(0), batches[0, :, :-1])
    loss_of = next_token_loss(model)
    pipeline = lw.layerwise(
        loss_of, params, batches[0], num_stages=2, num_microbatches=2, capacity=None, reduce="mean"
    )
    optimiser = optax.adamw(1e-2, eps=1e-5)
    staged = Run(pipeline.value_and_grad, pipeline.place(params), batches[0], optimiser)
    unstaged = Run(jax.value_and_grad(loss_of), params, batches[0], optimiser)
    losses = list(train_both(staged, unstaged, batches))
    assert losses[-1].staged < losses[0].staged
    assert compare(losses, pipeline, staged, unstaged).largest < 1e-4
    assert compare([Losses(1.0, 2.0)], pipeline, staged, unstaged).loss == 0.5
    assert draw(pipeline.plan, losses, tmp_path / "new" / "plan.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("--steps=0", "--steps=0"),
        ("--stages=13", "--stages=13"),
        ("--microbatches=5", "--batch must be a multiple of --microbatches"),
        ("--picture=plan.txt", "the suffix must be one of .png"),
        ("--devices=gpu", "<emulated|local>"),
        ("--capacity_mib=-1", "non-negative"),
    ],
)
@flagsaver.flagsaver
def test_wrong_flags_are_refused(wrong, words):
    with pytest.raises(flags.IllegalFlagValueError, match=re.escape(words)):
        flags.FLAGS(["quickstart", wrong])


@flagsaver.flagsaver
def test_a_word_that_is_no_flag_is_refused():
    with pytest.raises(app.UsageError, match="nothing is taken besides flags"):
        quickstart.main(["quickstart", "8"])


@pytest.mark.slow
def test_the_demonstration_ends_well(tmp_path):
    picture = tmp_path / "quickstart.svg"
    ran = python("-m", "experiments.quickstart", "--steps=3", f"--picture={picture}")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "Largest relative difference" in ran.stdout
    assert picture.exists()


@pytest.mark.slow
def test_the_demonstration_says_what_does_not_fit():
    ran = python("-m", "experiments.quickstart", "--capacity_mib=0.1")
    assert ran.returncode == 2
    assert "Cannot run" in ran.stdout
    assert "block_0" in ran.stdout
