"""Quickstart: its text, the side-by-side training, its flags and exit status."""

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
from layerwise_jax.examples import GPT, demonstration, next_token_loss, quickstart
from layerwise_jax.examples.pictures import draw
from layerwise_jax.examples.side_by_side import (
    Losses,
    Run,
    compare,
    largest_difference,
    train_both,
)
from layerwise_jax.examples.text import draw_batches, read_text
from tests.support.paths import ROOT, fast_compile


def run_quickstart(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "experiments.quickstart", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=fast_compile(),
    )


def test_text_is_ascii_and_longer_than_many_windows():
    text = read_text()
    assert len(text) > 4000
    assert max(text) < 128


def test_batches_are_windows_of_the_text_and_repeat():
    text = bytes(range(100))
    batches = draw_batches(text, steps=3, batch=5, length=7)
    assert batches.shape == (3, 5, 7)
    assert (np.diff(batches) == 1).all()
    assert len(np.unique(batches[..., 0])) > 5
    np.testing.assert_array_equal(batches, draw_batches(text, steps=3, batch=5, length=7))
    assert (draw_batches(text, 1, 2, 100) == np.arange(100)).all()
    with pytest.raises(ValueError, match=r"at least 101 bytes \(one window\), got 100"):
        draw_batches(text, 1, 1, 101)


def test_largest_difference_names_the_leaf_relative_to_its_largest_entry():
    expected = {"small": np.array([0.0, 1e-3]), "large": np.array([100.0, 1.0])}
    actual = {"small": np.array([1e-6, 1e-3]), "large": np.array([100.0, 1.001])}
    name, share = largest_difference(actual, expected)
    assert name == "small"
    assert share == pytest.approx(1e-3)
    assert largest_difference(expected, expected)[1] == 0
    assert largest_difference({"w": np.array([np.nan])}, {"w": np.ones(1)}) == ("w", np.inf)


def test_staged_and_unstaged_training_stay_together(tmp_path):
    """Held to 8 times what the unstaged run changes when it sums its examples in other orders."""
    model = GPT(vocabulary=256, width=16, depth=2, heads=2, context=8)
    batches = draw_batches(read_text(), steps=4, batch=4, length=model.context + 1)
    params = jax.jit(model.init)(jax.random.key(0), batches[0, :, :-1])
    loss_fn = next_token_loss(model)
    pipeline = lw.layerwise(
        loss_fn, params, batches[0], num_stages=2, num_microbatches=2, capacity=None, reduce="mean"
    )
    optimizer = optax.adamw(1e-2, eps=1e-5)

    def accumulated(params, tokens):
        """Mean over two microbatches."""
        halves = [jax.value_and_grad(loss_fn)(params, x) for x in jax.numpy.split(tokens, 2)]
        return jax.tree.map(lambda a, b: (a + b) / 2, *halves)

    def run_of(value_and_grad):
        own = jax.tree.map(jax.numpy.copy, params)  # a step donates its parameters
        return Run(value_and_grad, own, batches[0], optimizer)

    staged = Run(pipeline.value_and_grad, pipeline.place(params), batches[0], optimizer)
    unstaged = run_of(jax.value_and_grad(loss_fn))
    losses = list(train_both(staged, unstaged, batches))
    difference = compare(losses, pipeline, staged, unstaged)
    others = [run_of(jax.value_and_grad(loss_fn)), run_of(accumulated)]
    list(train_both(*others, batches[:, ::-1]))
    change = max(largest_difference(run.params, unstaged.params)[1] for run in others)
    assert losses[-1].staged < losses[0].staged
    assert difference.largest <= 8 * change < 0.1
    assert compare([Losses(1.0, 2.0)], pipeline, staged, unstaged).loss == 0.5
    assert draw(pipeline, losses, tmp_path / "new" / "plan.png").stat().st_size > 10_000


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demonstration.importlib.util, "find_spec", lambda name: None)
    console = demonstration.make_console()
    demonstration.draw_picture(None, [], tmp_path / "none.png", console)
    assert "'layerwise-jax[plot]'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("--steps=0", "--steps=0"),
        ("--stages=13", "--stages must be at most --depth"),
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
def test_an_argument_that_is_no_flag_is_refused():
    with pytest.raises(app.UsageError, match="must be flags"):
        quickstart.main(["quickstart", "8"])


@pytest.mark.slow
def test_the_demonstration_ends_well(tmp_path):
    picture = tmp_path / "quickstart.svg"
    ran = run_quickstart("--steps=3", f"--picture={picture}")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "Largest relative difference" in ran.stdout
    assert picture.exists()


@pytest.mark.slow
def test_the_demonstration_says_what_does_not_fit():
    ran = run_quickstart("--capacity_mib=0.1")
    assert ran.returncode == 2
    assert "Cannot run" in ran.stdout
    assert "block_0" in ran.stdout
