"""Programs of executor `host`: what they share, return and overwrite; checkpoints of both
executors.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

import layerwise_jax as lw
from layerwise_jax.pipeline import Pipeline
from tests.host import models
from tests.support.host import LIGHT

WIDTH, DEPTH, ROWS = 8, 8, 2
PARAMS = models.init()


def block(weight: jax.Array, x: jax.Array) -> jax.Array:
    return x + jnp.tanh(x @ weight.astype(jnp.bfloat16).astype(jnp.float32))


def uniform(params: Any, x: jax.Array) -> jax.Array:
    for weight in params:
        x = block(weight, x)
    return jnp.mean(jnp.square(x))


def build_uniform(mesh: Mesh, **options: Any) -> Pipeline:
    params = [jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)] * DEPTH
    layers = lw.trace_layers(uniform, params, jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32))
    assert len(layers) == DEPTH
    options = {"reduce": "mean", "executor": "host", "xla_options": LIGHT, "remat": None, **options}
    return lw.build_pipeline(layers, [0, 2, 4, 6, 8], mesh, 4, **options)


def test_equal_stages_share_programs(stage_mesh: Callable[..., Mesh]) -> None:
    """The two stages in the middle are equal; the first reads an input, the last has the loss."""
    executor = build_uniform(stage_mesh(4)).host_executor
    executor.compile(trains=True)
    library = executor.library
    assert len(library.programs) == 7  # F and B of three stages, both of the last
    assert library.num_distinct == 5
    names = [library.programs[stage, "B"].as_text().split()[1] for stage in (1, 2)]
    assert len(set(names)) == 1, "a persistent cache compares names"


@pytest.mark.parametrize("remat", [None, "cheap", "stage"])
def test_accumulators_are_overwritten(remat: Any, stage_mesh: Callable[..., Mesh]) -> None:
    executor = build_uniform(stage_mesh(4), remat=remat).host_executor
    executor.compile(trains=True)
    for (stage, kind), program in executor.library.programs.items():
        if kind in ("B", "FB"):
            trained = executor.program.stages[stage].trained
            accumulators = 4 * WIDTH * WIDTH * len(trained)  # float32
            assert program.memory_analysis().alias_size_in_bytes >= accumulators, (stage, kind)


def test_forward_returns_no_argument(stage_mesh: Callable[..., Mesh]) -> None:
    """Jit copies an input that is returned, so what a vjp keeps of its arguments is not stashed."""
    executor = build_uniform(stage_mesh(4)).host_executor
    for calls in executor.program.calls[:-1]:
        found = calls.functions.linearization
        stashed = {found.jaxpr.jaxpr.outvars[j] for j in found.stashed}
        assert stashed.isdisjoint(found.jaxpr.jaxpr.invars)
        kinds = [leaf.kind for leaf in found.leaves]
        assert "argument" in kinds
        assert len(stashed) == len(found.stashed), "each array once"


def test_casts_run_once_a_step(stage_mesh: Callable[..., Mesh]) -> None:
    """The prelude makes bfloat16 of the weights; stages read no float32 weight.

    The cast back to float32 stays in the stage: its result is larger than what it reads.
    """
    executor = build_uniform(stage_mesh(4)).host_executor
    avals = executor.program.staged.program.avals
    for stage in executor.program.stages:
        assert {avals[x].dtype for x in stage.prepared} == {jnp.dtype(jnp.bfloat16)}


def test_recomputing_stashes_nothing(stage_mesh: Callable[..., Mesh]) -> None:
    executor = build_uniform(stage_mesh(4), remat="stage").host_executor
    assert all(calls.functions.stash_avals == () for calls in executor.program.calls)
    kept = build_uniform(stage_mesh(4), remat=None).host_executor
    assert all(calls.functions.stash_avals for calls in kept.program.calls)


def test_checkpoints_go_from_one_executor_to_the_other(
    tmp_path: Path, stage_mesh: Callable[..., Mesh]
) -> None:
    batch = models.batch()
    layers = lw.trace_layers(models.loss, PARAMS, *(x[:4] for x in batch))
    optimizer = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2))

    def build(executor: str, boundaries: list[int]) -> tuple[Pipeline, Any]:
        pipeline = lw.build_pipeline(
            layers,
            boundaries,
            stage_mesh(2),
            2,
            reduce="mean",
            executor=executor,
            xla_options=LIGHT,
        )
        return pipeline, pipeline.train_step(optimizer)

    def trained(pipeline: Pipeline, step: Any, staged: Any, state: Any, seed: int) -> Any:
        staged, state, _ = step(staged, state, *models.batch(seed))
        return staged, state

    host, step = build("host", [0, 3, len(layers)])
    staged = host.place(PARAMS)
    staged, state = trained(host, step, staged, step.init(staged), 0)
    lw.save_checkpoint(tmp_path, 1, host, staged, state, optimizer=step.optimizer)
    loop, loop_step = build("loop", [0, 2, len(layers)])
    like = loop_step.init(loop.place(PARAMS))
    found = lw.restore_checkpoint(tmp_path, loop, like, optimizer=loop_step.optimizer)
    by_loop, _ = trained(loop, loop_step, found.params, found.optimizer_state, 1)
    by_host, _ = trained(host, step, staged, state, 1)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6),
        loop.gather(by_loop),
        host.gather(by_host),
    )
