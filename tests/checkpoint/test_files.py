"""Checkpoint files: written whole or not at all, and checked when they are read."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from layerwise_jax.build import build_pipeline
from layerwise_jax.checkpoint.files import read_step, write_step
from layerwise_jax.checkpoint.leaves import CheckpointError
from layerwise_jax.checkpoint.save import (
    checkpoint_steps,
    read_checkpoint,
    restore_checkpoint,
    save_checkpoint,
)
from layerwise_jax.pipeline import Pipeline
from layerwise_jax.trace.layers import trace_layers
from tests.models.checkpoint import WIDTH, assert_same, draw, stage


@pytest.fixture
def saved(tmp_path: Path, stage_mesh: Callable) -> tuple[Path, Pipeline]:
    """A directory with step 1, and the pipeline that saved it."""
    pipeline = stage(stage_mesh(2))
    save_checkpoint(tmp_path, 1, pipeline, pipeline.place(draw()))
    return tmp_path, pipeline


def test_orbax_alone_reads_and_writes_the_same(saved: tuple[Path, Pipeline]) -> None:
    directory, pipeline = saved
    with ocp.CheckpointManager(directory) as manager:
        target = jax.eval_shape(draw)
        items = manager.restore(1, args=ocp.args.Composite(params=ocp.args.StandardRestore(target)))
        manager.save(
            2,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave([2 * weight for weight in draw()])
            ),
        )
    assert_same(items["params"], draw())
    assert_same(
        restore_checkpoint(directory, pipeline).params,
        pipeline.place([2 * weight for weight in draw()]),
    )


SAVE_AND_DIE = """
    import os, signal, sys
    import jax
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    import jax.numpy as jnp
    import orbax.checkpoint as ocp
    from jax.sharding import Mesh
    from layerwise_jax.build import build_pipeline
    from layerwise_jax.checkpoint import save_checkpoint
    from layerwise_jax.trace import trace_layers

    def loss(params, x):
        for weight in params:
            x = jnp.tanh(x @ weight)
        return jnp.mean(x)

    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    params = [jnp.full((8, 8), 1.0)] * 8
    layers = trace_layers(loss, params, jnp.ones((4, 8)))
    pipeline = build_pipeline(layers, (0, 4, 8), Mesh(jax.devices(), ("stage",)), 1, reduce="mean")
    save_checkpoint(sys.argv[1], 1, pipeline, pipeline.place(params), keep=1)
    if sys.argv[2] == "arrays":
        ocp.StandardCheckpointHandler.finalize = die
    else:
        os.rename = os.replace = die
    save_checkpoint(sys.argv[1], 2, pipeline, pipeline.place([2 * w for w in params]), keep=1)
"""


def test_killed_in_the_middle_of_a_save(stage_mesh: Callable, tmp_path: Path) -> None:
    """The step before is still there, though only one was to be kept.

    Once with arrays written but not merged, once just before the new step gets its name.
    """
    script = textwrap.dedent(SAVE_AND_DIE)
    moments = ("arrays", "name")
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / moment), moment], stderr=subprocess.PIPE
        )
        for moment in moments
    ]
    pipeline = stage(stage_mesh(4))
    for moment, process in zip(moments, running, strict=True):
        _, messages = process.communicate()
        assert process.returncode == -signal.SIGKILL, messages.decode()
        directory = tmp_path / moment
        assert len(os.listdir(directory)) == 2, "the second save was not under way"
        assert checkpoint_steps(directory) == (1,)
        restored = restore_checkpoint(directory, pipeline)
        assert restored.step == 1
        assert_same(pipeline.gather(restored.params), [jnp.ones((WIDTH, WIDTH))] * 8)
        save_checkpoint(directory, 2, pipeline, restored.params, keep=2)
        assert sorted(os.listdir(directory)) == ["1", "2"]
        assert_same(restore_checkpoint(directory, pipeline).params, restored.params)


def remove(file: Path) -> None:
    file.unlink()


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_bits(file: Path) -> None:
    content = bytearray(file.read_bytes())
    for place in range(len(content) // 8, len(content), len(content) // 8 or 1):
        content[place] ^= 0x10
    file.write_bytes(content)


# A reader of orbax's that fails leaves tasks on a loop that has ended.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("spoil", [remove, cut_off, flip_bits])
def test_a_damaged_file(
    spoil: Callable[[Path], None], stage_mesh: Callable, tmp_path: Path
) -> None:
    """Whichever file it is: an error that says so, or the right weights, but never others.

    One weight is large enough for a change of its bits to decompress without an error.
    """
    weight = jnp.asarray(np.random.default_rng(2).normal(size=(256, 256)), jnp.float32)
    layers = trace_layers(lambda w, x: jnp.tanh(x @ w), weight, jnp.ones((1, 256)))
    pipeline = build_pipeline(layers, (0, len(layers)), stage_mesh(1), 1)
    whole, broken, refused = tmp_path / "whole", tmp_path / "broken", 0
    save_checkpoint(whole, 1, pipeline, pipeline.place(weight))
    for file in [path.relative_to(whole) for path in whole.rglob("*") if path.is_file()]:
        shutil.copytree(whole, broken)
        spoil(broken / file)
        try:
            assert_same(read_checkpoint(broken, weight).params, weight)
        except CheckpointError as error:
            refused += f"Step 1 of {broken}" in str(error)
        shutil.rmtree(broken)
    assert refused >= 3


def test_no_such_checkpoint(saved: tuple[Path, Pipeline]) -> None:
    directory, pipeline = saved
    with pytest.raises(CheckpointError, match=r"has steps 1, got 2"):
        restore_checkpoint(directory, pipeline, step=2)
    with pytest.raises(CheckpointError, match="has no checkpoint, got None"):
        restore_checkpoint(directory / "elsewhere", pipeline)
    assert checkpoint_steps(directory / "elsewhere") == ()
    assert not (directory / "elsewhere").exists()
    with pytest.raises(CheckpointError, match="has no optimizer_state"):
        restore_checkpoint(directory, pipeline, optax.adam(1.0).init(pipeline.place(draw())))


def test_another_model(saved: tuple[Path, Pipeline]) -> None:
    directory, _ = saved
    with pytest.raises(CheckpointError, match="params with no 8"):
        read_checkpoint(directory, draw(9))
    with pytest.raises(CheckpointError, match="params with 7 as well"):
        read_checkpoint(directory, draw(7))
    with pytest.raises(CheckpointError, match=r"params 3 as float32\[8, 4\], got float32\[8, 8\]"):
        read_checkpoint(directory, [w[:, :4] if i == 3 else w for i, w in enumerate(draw())])
    with pytest.raises(
        CheckpointError, match=r"params 0 as bfloat16\[8, 8\], got float32\[8, 8\] .and 7 more"
    ):
        read_checkpoint(directory, jax.tree.map(lambda w: w.astype(jnp.bfloat16), draw()))


@pytest.mark.parametrize(
    ("step", "options", "message"),
    [
        (-1, {}, "step must be .*got -1"),
        (1.5, {}, "step must be .*got 1.5"),
        (True, {}, "step must be .*got True"),
        (1, {}, "must be later than step 1"),
        (0, {}, "must be later than step 1"),
        (2, {"keep": 0}, "keep must be .*got 0"),
        (2, {"staged": {}}, "must be this pipeline's placed parameters"),
        (2, {"optimizer_state": ("adam",)}, "got 'adam' at 0"),
        (
            2,
            {"optimizer_state": (np.zeros((0, 3)),)},
            r"got an array of shape \(0, 3\) at 0",
        ),
    ],
)
def test_refused_before_anything_is_written(
    step: Any, options: dict, message: str, saved: tuple[Path, Pipeline]
) -> None:
    directory, pipeline = saved
    arguments = {"staged": pipeline.place(draw()), **options}
    with pytest.raises(ValueError, match=message):
        save_checkpoint(directory, step, pipeline, **arguments)
    assert os.listdir(directory) == ["1"]
    assert_same(read_checkpoint(directory, draw()).params, draw())


def test_a_file_where_the_directory_should_be(saved: tuple[Path, Pipeline]) -> None:
    directory, pipeline = saved
    (directory / "notes").write_text("mine")
    for call in (
        save_checkpoint,
        lambda home, step, pipeline, _: restore_checkpoint(home, pipeline, step=step),
    ):
        with pytest.raises(ValueError, match="must be a directory"):
            call(directory / "notes", 2, pipeline, pipeline.place(draw()))
    assert (directory / "notes").read_text() == "mine"


def test_keep(saved: tuple[Path, Pipeline], monkeypatch: pytest.MonkeyPatch) -> None:
    directory, pipeline = saved
    monkeypatch.chdir(directory.parent)
    for step in (np.int64(2), 3, 10):
        save_checkpoint(directory.name, step, pipeline, pipeline.place(draw()), keep=2)
    assert checkpoint_steps(directory) == (3, 10)
    assert restore_checkpoint(directory, pipeline).step == 10


OTHER_TREES = {
    "an empty node more": (optax.adam(1e-2), optax.adamw(1e-2), r"no \[2\]\."),
    "an empty node less": (optax.adamw(1e-2), optax.adam(1e-2), r"\[2\] as well"),
    "other leaves": (optax.adam(1e-2), optax.sgd(1e-2, momentum=0.9), "no 0/trace/0"),
}


@pytest.mark.parametrize(
    ("saved_by", "read_by", "words"), OTHER_TREES.values(), ids=list(OTHER_TREES)
)
def test_the_state_of_another_optimizer_is_not_damaged(
    saved_by: optax.GradientTransformation,
    read_by: optax.GradientTransformation,
    words: str,
    tmp_path: Path,
) -> None:
    params = [np.ones((2, 2), np.float32)]
    write_step(tmp_path, 1, {"optimizer_state": saved_by.init(params)}, None)
    with pytest.raises(CheckpointError, match=words) as refusal:
        read_step(tmp_path, 1, {"optimizer_state": read_by.init(params)})
    assert "damaged" not in str(refusal.value)
    assert "another optimizer" in str(refusal.value)


def test_a_list_is_not_a_dict_of_numbers(tmp_path: Path) -> None:
    write_step(tmp_path, 1, {"params": [np.ones(2), np.ones(3)]}, None)
    with pytest.raises(CheckpointError, match=r"no 0, 1 and \[0\], \[1\] as well"):
        read_step(tmp_path, 1, {"params": {"0": np.ones(2), "1": np.ones(3)}})


def test_a_step_with_damaged_metadata_is_refused_by_every_call(tmp_path: Path) -> None:
    """Orbax reads the metadata of all steps whenever it opens a directory."""
    tree = {"params": [np.ones(2)]}
    write_step(tmp_path, 1, tree, None)
    write_step(tmp_path, 2, tree, None)
    metadata = tmp_path / "1" / "_CHECKPOINT_METADATA"
    text = metadata.read_text().replace("item_handlers", "handlers")
    metadata.write_text(text.replace("init_timestamp_nsecs", "timestamp"))
    for call in (
        lambda: checkpoint_steps(tmp_path),
        lambda: read_step(tmp_path, 2, tree),
        lambda: write_step(tmp_path, 3, tree, None),
    ):
        with pytest.raises(CheckpointError, match=r"damaged metadata.*Move that step"):
            call()
