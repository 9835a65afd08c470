"""Options of a ring are checked when they are made, and give the ring of single choices."""

from typing import Any

import pytest

import layerwise_jax as lw
from tests.models.ring import gpt, gpt_cache, gpt_step


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"num_groups": 0}, "num_groups must be"),
        ({"pad_token": -1}, "pad_token must be"),
        ({"sampler": 0.5}, "sampler must be None or an lw.Sampler"),
        ({"prefill_length": 8}, "prefill_fn and prefill_length must be given together"),
    ],
)
def test_a_wrong_value_is_refused_before_anything_is_traced(choice: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        lw.DecodeOptions(**choice)


def test_an_unknown_option_is_refused_with_the_known_ones() -> None:
    with pytest.raises(TypeError, match=r"among num_groups, .*transport, got temperature"):
        lw.decode_ring(gpt_step, gpt(2), gpt_cache(2, 2), group_size=2, temperature=1.0)


def test_single_choices_replace_those_of_the_options() -> None:
    options = lw.DecodeOptions(stop_tokens=(1,), pad_token=3)
    ring = lw.decode_ring(
        gpt_step,
        gpt(2),
        gpt_cache(2, 2),
        group_size=2,
        num_stages=2,
        options=options,
        stop_tokens=[2],
    )
    assert ring.stop_tokens == (2,)
    assert ring.ring.pad_token == 3
