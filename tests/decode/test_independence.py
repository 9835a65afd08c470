"""Independence of a group's sequences, and the advice of its refusals."""

import inspect
import re
from dataclasses import fields
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from layerwise_jax.batch.analysis import BatchError
from layerwise_jax.decode.build import decode_ring
from layerwise_jax.decode.independence import check_independence
from layerwise_jax.decode.options import DecodeOptions
from tests.models.ring import gpt, gpt_cache, gpt_step, recurrent_cache, recurrent_step

LAYERS, GROUP = 2, 2


def sorting(params: Any, cache: Any, tokens: Any, positions: Any) -> tuple[Any, Any]:
    """Beam search's reorder."""
    logits, cache = recurrent_step(params, cache, tokens, positions)
    return logits, [held[jnp.argsort(held[:, 0])] for held in cache]


def normalizing(params: Any, cache: Any, tokens: Any, positions: Any) -> tuple[Any, Any]:
    """A statistic of the group: the pipeline's refusal offers `batch_statistics`."""
    logits, cache = recurrent_step(params, cache, tokens, positions)
    return logits - logits.mean(axis=0), cache


def counting_examples(params: Any, cache: Any, tokens: Any, positions: Any) -> tuple[Any, Any]:
    """Shared state that depends on the examples: the pipeline's refusal offers a microbatch."""
    logits, held = recurrent_step(params, cache["states"], tokens, positions)
    return logits, {"states": held, "mean": cache["mean"] + held[0].mean()}


def scaling(params: Any, cache: Any, tokens: Any, positions: Any) -> tuple[Any, Any]:
    """Logits scaled by the length of the batch."""
    logits, cache = recurrent_step(params, cache, tokens, positions)
    return logits * tokens.shape[0], cache


def selecting(params: Any, cache: Any, tokens: Any, positions: Any) -> tuple[Any, Any]:
    """One sequence read by its place."""
    logits, cache = recurrent_step(params, cache, tokens, positions)
    return logits + logits[:1], cache


STEPS = {step.__name__: step for step in (sorting, normalizing, counting_examples, scaling)}
STEPS["selecting"] = selecting


def cache_of(step: Any) -> Any:
    states = recurrent_cache(LAYERS, GROUP)
    return {"states": states, "mean": jnp.float32(0)} if step is counting_examples else states


@pytest.mark.parametrize("name", STEPS)
def test_a_refusal_gives_advice_that_a_ring_can_take(name: str) -> None:
    step = STEPS[name]
    with pytest.raises(BatchError, match=r"got num_groups=2\.") as caught:
        decode_ring(step, gpt(LAYERS), cache_of(step), group_size=GROUP, num_stages=2)
    message = str(caught.value)
    assert "microbatch" not in message
    named = set(re.findall(r"\b([a-z_]+)=", message))
    taken = {field.name for field in fields(DecodeOptions)}
    assert named <= {*inspect.signature(decode_ring).parameters, *taken}, named


@pytest.mark.parametrize("name", STEPS)
def test_one_group_may_mix_its_sequences(name: str) -> None:
    step = STEPS[name]
    arguments = (gpt(LAYERS), cache_of(step), GROUP)
    assert not check_independence(step, *arguments, num_groups=1)


def test_a_step_by_sequences_is_independent_in_one_group_and_in_several() -> None:
    cache = jax.eval_shape(lambda: gpt_cache(LAYERS, GROUP))
    for num_groups in (1, 3):
        assert check_independence(gpt_step, gpt(LAYERS), cache, GROUP, num_groups)


def test_a_pass_over_prompts_is_named() -> None:
    def reading(params: Any, cache: Any, tokens: Any, lengths: Any) -> tuple[Any, Any]:
        return normalizing(params, cache, tokens[:, -1], lengths)

    with pytest.raises(BatchError, match="prefill_fn must generate each sequence by itself"):
        check_independence(reading, gpt(LAYERS), recurrent_cache(LAYERS, GROUP), GROUP, 2, 3)
