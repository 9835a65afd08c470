"""Steps that cannot be a ring, and arguments that a ring refuses."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from layerwise_jax.batch.analysis import BatchError
from layerwise_jax.decode.build import decode_ring
from layerwise_jax.decode.ring import DecodeRing
from layerwise_jax.decode.sampling import Sampler
from layerwise_jax.stage.cut import CutError
from tests.models.ring import VOCABULARY, WIDTH, Step, draw, gpt, gpt_cache, gpt_step, make_ring


def test_what_cannot_be_a_ring_is_refused(stage_mesh: Callable[..., Mesh]) -> None:
    params, cache = gpt(4), jax.eval_shape(lambda: gpt_cache(4, 2))

    def mixing(params: Any, cache: Any, tokens: Any, positions: Any) -> tuple[Any, Any]:
        logits, cache = gpt_step(params, cache, tokens, positions)
        return logits - logits.mean(axis=0), cache

    def rereading(params: Any, cache: Any, tokens: Any, positions: Any) -> tuple[Any, Any]:
        logits, cache = gpt_step(params, cache, tokens, positions)
        return logits + (params["head"].T @ params["head"])[tokens], cache

    def make(step: Step, cache: Any = cache, **options: Any) -> DecodeRing:
        return decode_ring(step, params, cache, **{"group_size": 2, "num_stages": 2, **options})

    with pytest.raises(BatchError, match="num_groups=2"):
        make(mixing)
    with pytest.raises(CutError, match="Only the first stage may read the tokens"):
        make(rereading)
    with pytest.raises(ValueError, match="one row a sequence"):
        make(lambda p, c, t, x: (gpt_step(p, c, t, x)[0][:, None], c))
    with pytest.raises(ValueError, match="a cache of the types that it is given"):
        make(lambda p, c, t, x: (gpt_step(p, c, t, x)[0], c[:-1]))
    with pytest.raises(ValueError, match=r"group_size must be .*got 0"):
        make(gpt_step, group_size=0)
    for name, wrong in {
        "num_groups": 2.5,
        "num_stages": 3.0,
        "pad_token": "x",
        "stop_tokens": 3,
    }.items():
        with pytest.raises(ValueError, match=f"{name} must be .*got {wrong!r}"):
            make(gpt_step, **{name: wrong})
    with pytest.raises(ValueError, match=r"sampler must be None or an lw\.Sampler, got 'greedy'"):
        make(gpt_step, sampler="greedy")
    with pytest.raises(ValueError, match="a ring for each replica"):
        make(gpt_step, mesh=stage_mesh(2, data=2))
    with pytest.raises(ValueError, match=r"temperature must be .*got -1"):
        Sampler(-1)
    with pytest.raises(ValueError, match=r"temperature must be .*got 'hot'"):
        Sampler("hot")
    with pytest.raises(ValueError, match=r"top_k must be .*got 0"):
        Sampler(1.0, 0)


def test_wrong_arguments_are_refused() -> None:
    ring = make_ring("gpt", 4, 2, 2)
    staged = ring.place(gpt(4))
    with pytest.raises(ValueError, match="params must have the tree"):
        ring.place({"embed": draw(VOCABULARY, WIDTH)})
    with pytest.raises(ValueError, match=r"tokens must have shape \[2, 2\], got \[1, 2\]"):
        ring.start(np.zeros((1, 2)))
    with pytest.raises(ValueError, match="caches must be one a group, 2, got 1"):
        ring.start(np.zeros((2, 2)), caches=[gpt_cache(4, 2)])
    with pytest.raises(ValueError, match="parameters that this ring placed"):
        ring.generate({}, [np.asarray([1])], 1)
    with pytest.raises(ValueError, match="at least one prompt"):
        ring.generate(staged, [], 1)
    with pytest.raises(ValueError, match=r"max_new_tokens must be .*got 1\.5"):
        ring.generate(staged, [[1]], 1.5)
    with pytest.raises(ValueError, match=r"steps_per_call must be .*got 0"):
        ring.generate(staged, [[1]], 1, steps_per_call=0)
    with pytest.raises(ValueError, match=r"prompts\[1\] must be .*got int32\[0\]"):
        ring.generate(staged, [np.asarray([1]), np.asarray([], np.int32)], 1)
    with pytest.raises(ValueError, match=r"prompts\[0\] must be .*got float64\[1\]"):
        ring.generate(staged, [[1.5]], 1)
    with pytest.raises(
        ValueError, match=r"prompts\[0\] must have tokens .*got -1 to 2"
    ):  # -1 stands for none among those of a ring
        ring.generate(staged, [[1, -1, 2]], 1)
    with pytest.raises(ValueError, match=r"forced must have shape .* got \[3, 1, 2\]"):
        ring(staged, ring.start(np.zeros((2, 2))), np.full((3, 1, 2), -1))
    with pytest.raises(ValueError, match=r"shape \[2, 2\], got \[1, 2\]"):
        ring.generate(staged, [np.asarray([1])] * 2, 1, keys=jax.random.split(jax.random.key(0), 1))
    with pytest.raises(ValueError, match=r"shape \[1, 2\], got \[1, 4\].*default implementation"):
        ring.generate(
            staged, [np.asarray([1])], 1, keys=jax.random.split(jax.random.key(0, impl="rbg"), 1)
        )
    with pytest.raises(ValueError, match="keys must be an array of random keys, got list"):
        ring.generate(staged, [np.asarray([1])], 1, keys=[0])
