"""Checkpoints: what one pipeline saves another restores, bit by bit, and nothing that was saved is lost."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.core import FrozenDict
from staging import assert_trees_close, compile_lightly, even_boundaries, stage_case, stage_step, uneven_boundaries
from zoo import CASES

from layerwise_jax.build import build_pipeline
from layerwise_jax.checkpoint import checkpoint_steps, read_checkpoint, restore_checkpoint, save_checkpoint
from layerwise_jax.checkpoint_files import CheckpointError
from layerwise_jax.layers import trace_layers
from layerwise_jax.pipeline import Pipeline

WIDTH, ROWS = 8, 16

Norm = namedtuple("Norm", "scale steps")


def assert_same(got: Any, want: Any) -> None:
    """Two trees have the same structure, and leaves of the same type and the same bits."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (jnp.shape(x), x.dtype) == (jnp.shape(y), y.dtype)
        if jnp.issubdtype(y.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def draw(depth: int = 8) -> list[jax.Array]:
    random = np.random.default_rng(0)
    return [jnp.asarray(random.normal(size=(WIDTH, WIDTH)) / 3, jnp.float32) for _ in range(depth)]


def loss(params: list[jax.Array], x: jax.Array) -> jax.Array:
    for weight in params:
        x = jnp.tanh(x @ weight)
    return jnp.mean(jnp.square(x - 1.0))


X = jnp.asarray(np.random.default_rng(1).normal(size=(ROWS, WIDTH)), jnp.float32)


def stage(mesh: Any, num_microbatches: int = 4, **options: Any) -> Pipeline:
    """The pipeline of `loss` over the mesh."""
    layers = trace_layers(loss, draw(), X[: ROWS // num_microbatches])
    boundaries = even_boundaries(len(layers), mesh.shape["stage"])
    return build_pipeline(layers, boundaries, mesh, num_microbatches, reduce="mean", **options)


@pytest.fixture
def saved(tmp_path: Path, stage_mesh: Callable) -> tuple[Path, Pipeline]:
    """A directory with step 1, and the pipeline that saved it."""
    pipeline = stage(stage_mesh(2))
    save_checkpoint(tmp_path, 1, pipeline, pipeline.place(draw()))
    return tmp_path, pipeline


MODELS = [
    ("gpt", 8),
    ("gpt_scan", 8),
    ("indexed", 8),
    ("resnet_train", 6),
    ("nnx_batch_norm_train", 8),
    ("odd_outputs", 8),
]


@pytest.mark.parametrize(("name", "many"), MODELS)
def test_saved_on_four_stages_then_two_then_many_then_none(
    name: str, many: int, stage_mesh: Callable, tmp_path: Path
) -> None:
    """Tied embeddings, stacked weights, running averages, an unused weight: every model comes back as it was traced."""
    case = CASES[name]()

    def staged_on(num_stages: int, cut: Callable, schedule: str) -> Pipeline:
        if case.state:
            return stage_step(case, stage_mesh(num_stages), 1, cut, schedule=schedule)
        return stage_case(case, case.loss_fn, stage_mesh(num_stages), 1, cut, schedule=schedule)

    four, two = staged_on(4, even_boundaries, "1f1b"), staged_on(2, uneven_boundaries, "gpipe")
    last = staged_on(many, even_boundaries, "1f1b")
    save_checkpoint(tmp_path, 4, four, four.place(case.params))
    on_two = restore_checkpoint(tmp_path, two)
    assert on_two.step == 4
    assert_same(two.gather(on_two.params), two.gather(two.place(case.params)))
    save_checkpoint(tmp_path, 5, two, on_two.params)
    on_many = restore_checkpoint(tmp_path, last).params
    assert_same(on_many, last.place(case.params))
    save_checkpoint(tmp_path, 6, last, on_many)
    assert_same(read_checkpoint(tmp_path, jax.eval_shape(lambda: case.params)).params, case.params)
    assert checkpoint_steps(tmp_path) == (4, 5, 6)
    assert_same(read_checkpoint(tmp_path, case.params, step=4).params, case.params)


def odd_params() -> Any:
    return {
        "mlp/~/linear": FrozenDict({"w": draw()[0].astype(jnp.bfloat16)}),
        "layers": (draw()[1], [draw()[2]]),
        "norm": Norm(jnp.float32(2), jnp.int8(3)),
        "keys": jax.random.split(jax.random.key(7), 2),
        "other_key": jax.random.key(8, impl="rbg"),
        "on": jnp.asarray([True, False] * 4),
    }


def odd_model(params: Any, x: jax.Array) -> jax.Array:
    noise = jax.random.normal(params["keys"][1], (WIDTH,)) + jax.random.normal(params["other_key"], (WIDTH,))
    x = jnp.tanh(x @ params["mlp/~/linear"]["w"].astype(jnp.float32)) + noise
    x = jnp.where(params["on"], jnp.tanh(x @ params["layers"][0]), x)
    return jnp.tanh(x @ params["layers"][1][0]) * params["norm"].scale * params["norm"].steps


@pytest.mark.parametrize("num_stages", [1, 3])
def test_keys_small_types_and_containers_survive(num_stages: int, stage_mesh: Callable, tmp_path: Path) -> None:
    params = odd_params()
    layers = trace_layers(odd_model, params, X)
    save_on, restore_on = (
        build_pipeline(layers, even_boundaries(len(layers), k), stage_mesh(k), 1) for k in (2, num_stages)
    )
    save_checkpoint(tmp_path, 0, save_on, save_on.place(params))
    restored = restore_checkpoint(tmp_path, restore_on).params
    assert_same(restored, restore_on.place(params))
    assert_same(restore_on.gather(restored), params)
    assert_same(read_checkpoint(tmp_path, params).params, params)


def test_a_model_of_one_array(stage_mesh: Callable, tmp_path: Path) -> None:
    layers = trace_layers(lambda w, x: jnp.tanh(x @ w), draw()[0], X)
    pipeline = build_pipeline(layers, (0, len(layers)), stage_mesh(1), 1)
    save_checkpoint(tmp_path, 0, pipeline, pipeline.place(draw()[0]))
    assert_same(restore_checkpoint(tmp_path, pipeline).params, pipeline.place(draw()[0]))


def test_orbax_alone_reads_the_users_names(saved: tuple[Path, Pipeline]) -> None:
    directory, _ = saved
    with ocp.CheckpointManager(directory) as manager:
        target = jax.eval_shape(draw)
        items = manager.restore(1, args=ocp.args.Composite(params=ocp.args.StandardRestore(target)))
    assert_same(items["params"], draw())


def train(value_and_grad: Callable, optimizer: Any, params: Any, state: Any, num_steps: int) -> tuple[Any, Any]:
    @compile_lightly
    def step(params: Any, state: Any) -> tuple[Any, Any]:
        _, grads = value_and_grad(params, X)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(num_steps):
        params, state = step(params, state)
    return params, state


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(stage_mesh: Callable, tmp_path: Path) -> None:
    """Three steps on four stages, then three more on two by another schedule, or on none, or on four again."""
    optimizer = optax.adamw(optax.cosine_decay_schedule(1e-2, 6))
    whole = train(jax.value_and_grad(loss), optimizer, draw(), optimizer.init(draw()), 6)
    four, two = stage(stage_mesh(4)), stage(stage_mesh(2), 2, schedule="gpipe")
    staged = four.place(draw())
    staged, state = train(four.value_and_grad, optimizer, staged, optimizer.init(staged), 3)
    save_checkpoint(tmp_path, 3, four, staged, state)

    types = jax.eval_shape(optimizer.init, two.place(jax.eval_shape(draw)))
    on_two = restore_checkpoint(tmp_path, two, types)
    ended, _ = train(two.value_and_grad, optimizer, on_two.params, on_two.optimizer_state, 3)
    assert_trees_close(two.gather(ended), whole[0], 1e-5)

    alone = read_checkpoint(tmp_path, draw(), optimizer.init(draw()))
    ended = train(jax.value_and_grad(loss), optimizer, alone.params, alone.optimizer_state, 3)
    assert_trees_close(ended, whole, 1e-5)

    again = restore_checkpoint(tmp_path, four, state)
    assert_same((again.params, again.optimizer_state), (staged, state))


def test_state_of_another_type_than_the_weights(stage_mesh: Callable, tmp_path: Path) -> None:
    """Moments in bfloat16, a key, a number of Python's, parts that hold nothing; replicas hold it all twice."""
    four, two = stage(stage_mesh(4)), stage(stage_mesh(2, data=2), 2)
    optimizer = optax.chain(optax.adam(1e-2, mu_dtype=jnp.bfloat16), optax.add_noise(1e-3, 0.5, jax.random.key(3)))
    staged = four.place(draw())
    _, state = train(four.value_and_grad, optimizer, staged, optimizer.init(staged), 2)
    save_checkpoint(tmp_path, 2, four, staged, (state, {"rate": 0.5}))
    on_two = restore_checkpoint(tmp_path, two, (optimizer.init(two.place(draw())), {"rate": 0.0})).optimizer_state
    save_checkpoint(tmp_path, 3, two, two.place(draw()), on_two)
    again = restore_checkpoint(tmp_path, four, (state, {"rate": 0.0}))
    assert_same(again.optimizer_state, (state, {"rate": jnp.float32(0.5)}))
    plain = read_checkpoint(tmp_path, draw(), (optimizer.init(draw()), {"rate": 0.0}))
    assert plain.optimizer_state[0][0][0].mu[0].dtype == jnp.bfloat16


class Factored:
    """Moves a state that is one number a weight, in the order of the user's leaves."""

    def gather_state(self, state: jax.Array) -> list[jax.Array]:
        return list(state)

    def place_state(self, state: list[np.ndarray]) -> jax.Array:
        return jnp.stack(state)


def test_an_optimiser_that_moves_its_state_itself(stage_mesh: Callable, tmp_path: Path) -> None:
    pipeline = stage(stage_mesh(2))
    staged, state = pipeline.place(draw()), jnp.arange(8.0)
    save_checkpoint(tmp_path, 0, pipeline, staged, state, optimizer=Factored())
    assert_same(restore_checkpoint(tmp_path, pipeline, state, optimizer=Factored()).optimizer_state, state)
    assert_same(read_checkpoint(tmp_path, draw(), list(state)).optimizer_state, list(state))


def test_a_state_that_is_not_entry_by_entry_is_refused(saved: tuple[Path, Pipeline]) -> None:
    directory, pipeline = saved
    staged = pipeline.place(draw())
    state = jax.eval_shape(optax.scale_by_factored_rms(min_dim_size_to_factor=1).init, staged)
    with pytest.raises(ValueError, match=r"\.v_row came with shape .* Pass the optimiser"):
        save_checkpoint(directory, 2, pipeline, staged, state)
    assert checkpoint_steps(directory) == (1,)


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
    from layerwise_jax.layers import trace_layers

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
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path / moment), moment], stderr=subprocess.PIPE)
        for moment in moments
    ]
    pipeline = stage(stage_mesh(4))
    for moment, process in zip(moments, running, strict=True):
        _, messages = process.communicate(timeout=120)
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


# A reader of orbax's that fails leaves tasks on a loop that has ended.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_file_that_is_gone_or_cut_off(saved: tuple[Path, Pipeline], tmp_path: Path) -> None:
    """Whichever file it is: an error that says so, or the right weights, but never others."""
    directory, pipeline = saved
    want, whole, refused = pipeline.place(draw()), tmp_path / "copy", 0
    shutil.copytree(directory / "1", whole / "1")
    files = sorted(path.relative_to(whole) for path in (whole / "1").rglob("*") if path.is_file())
    for spoil in (Path.unlink, lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])):
        for file in files:
            broken = tmp_path / "broken"
            shutil.copytree(whole, broken)
            spoil(broken / file)
            try:
                assert_same(restore_checkpoint(broken, pipeline).params, want)
            except CheckpointError as error:
                refused += f"Step 1 of {broken}" in str(error)
            shutil.rmtree(broken)
    assert refused >= 4


def test_no_such_checkpoint(saved: tuple[Path, Pipeline]) -> None:
    directory, pipeline = saved
    with pytest.raises(CheckpointError, match=r"Wanted step 2, but .* has steps 1"):
        restore_checkpoint(directory, pipeline, step=2)
    with pytest.raises(CheckpointError, match=r"Wanted the latest step, but .* has no checkpoint"):
        restore_checkpoint(directory / "elsewhere", pipeline)
    assert checkpoint_steps(directory / "elsewhere") == ()
    assert not (directory / "elsewhere").exists()
    with pytest.raises(CheckpointError, match="has no optimizer_state"):
        restore_checkpoint(directory, pipeline, optax.adam(1.0).init(pipeline.place(draw())))


def test_another_model(saved: tuple[Path, Pipeline]) -> None:
    directory, _ = saved
    with pytest.raises(CheckpointError, match="no params 8, but 0, 1"):
        read_checkpoint(directory, draw(9))
    with pytest.raises(CheckpointError, match="has params 7, but wanted"):
        read_checkpoint(directory, draw(7))
    with pytest.raises(CheckpointError, match=r"params 3 as float32\[8, 8\], but wanted was float32\[8, 4\]"):
        read_checkpoint(directory, [w[:, :4] if i == 3 else w for i, w in enumerate(draw())])
    with pytest.raises(CheckpointError, match=r"params 0 as float32\[8, 8\], but wanted was bfloat16\[8, 8\]"):
        read_checkpoint(directory, jax.tree.map(lambda w: w.astype(jnp.bfloat16), draw()))


@pytest.mark.parametrize(
    ("step", "options", "message"),
    [
        (-1, {}, "step came as -1"),
        (1.5, {}, "step came as 1.5"),
        (True, {}, "step came as True"),
        (1, {}, "has step 1 already"),
        (0, {}, "has step 1 already"),
        (2, {"keep": 0}, "keep came as 0"),
        (2, {"staged": {}}, "not this pipeline's placed parameters"),
        (2, {"optimizer_state": ("adam",)}, "optimizer_state has 'adam' at 0"),
        (2, {"optimizer_state": (np.zeros((0, 3)),)}, r"optimizer_state has an array of shape \(0, 3\) at 0"),
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
    for call in (save_checkpoint, lambda home, step, pipeline, _: restore_checkpoint(home, pipeline, step=step)):
        with pytest.raises(ValueError, match="no directory"):
            call(directory / "notes", 2, pipeline, pipeline.place(draw()))
    assert (directory / "notes").read_text() == "mine"


def test_keep(saved: tuple[Path, Pipeline], monkeypatch: pytest.MonkeyPatch) -> None:
    directory, pipeline = saved
    monkeypatch.chdir(directory.parent)
    for step in (np.int64(2), 3, 10):
        save_checkpoint(directory.name, step, pipeline, pipeline.place(draw()), keep=2)
    assert checkpoint_steps(directory) == (3, 10)
    assert restore_checkpoint(directory, pipeline).step == 10
