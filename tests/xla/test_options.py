"""Options are kept only where they make the working set smaller, and the compiler knows every one
that is offered.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise_jax.cost.devices import H100
from layerwise_jax.xla.aot import can_compile_for_absent_gpus, compile_for
from layerwise_jax.xla.options import (
    CHOICES,
    HAZARDS,
    NOTHING_PINS_L2,
    Choice,
    OptionError,
    Options,
    check_options,
    choose_options,
    hazards,
)

needs_plugin = pytest.mark.skipif(
    not can_compile_for_absent_gpus(), reason="the CUDA plugin (extra aot) is not importable"
)


class Sizes(NamedTuple):
    temp_bytes: int
    peak_bytes: int
    seconds: float = 1.0


def choice(*names: str) -> Choice:
    return Choice(" and ".join(names), dict.fromkeys(names, True), "a reason", "evidence")


def compiler(sizes: dict[frozenset[str], Sizes]):
    """A compiler that knows the sizes of some combinations of options and fails on all others."""

    def compile_with(options: Options) -> Sizes:
        if frozenset(options) not in sizes:
            raise RuntimeError(f"INTERNAL: {sorted(options)} went wrong\nand more lines")
        return sizes[frozenset(options)]

    return compile_with


def compile_tiny(options: Options):
    return compile_for(
        None, lambda x: x + 1, [jax.ShapeDtypeStruct((8,), jnp.float32)], options=options
    )


def test_what_shrinks_is_kept_and_built_upon():
    compile_with = compiler(
        {
            frozenset(): Sizes(100, 1000),
            frozenset("a"): Sizes(50, 950),
            frozenset("ab"): Sizes(50, 900),
            frozenset("abc"): Sizes(60, 890),
        }
    )
    report = choose_options(compile_with, [choice("a"), choice("b"), choice("c"), choice("d")])
    assert report.options == {"a": True, "b": True}
    assert (report.before.temp_bytes, report.after.temp_bytes, report.after.peak_bytes) == (
        100,
        50,
        900,
    )
    verdicts = [trial.verdict for trial in report.trials]
    assert verdicts[:4] == ["as the compiler would", "smaller", "smaller", "larger"]
    assert verdicts[4] == "does not compile or run: INTERNAL: ['a', 'b', 'd'] went wrong"


def test_what_changes_nothing_is_left_alone():
    report = choose_options(
        compiler({frozenset(): Sizes(1, 2), frozenset("a"): Sizes(1, 2)}), [choice("a")]
    )
    assert report.options == {}
    assert report.after is report.before


def test_smaller_but_slower_is_not_kept_where_runs_can_be_timed():
    sizes = {
        frozenset(): Sizes(100, 1000, 1.0),
        frozenset("a"): Sizes(50, 900, 1.2),
        frozenset("b"): Sizes(60, 900, 1.01),
    }
    timed = choose_options(
        compiler(sizes), [choice("a"), choice("b")], run_seconds=lambda program: program.seconds
    )
    assert timed.options == {"b": True}
    assert timed.trials[1].verdict == "slower"
    assert choose_options(compiler(sizes), [choice("a")]).options == {"a": True}


@given(
    st.dictionaries(
        st.sets(st.sampled_from("abc")).map(frozenset), st.tuples(*[st.integers(0, 9)] * 2)
    )
)
def test_nothing_that_is_kept_enlarges_the_working_set(found):
    sizes = {names: Sizes(*each) for names, each in found.items()} | {frozenset(): Sizes(5, 5)}
    report = choose_options(compiler(sizes), [choice("a"), choice("b"), choice("c")])
    kept = sizes[frozenset(report.options)]
    assert kept.temp_bytes <= 5
    assert kept.peak_bytes <= 5
    assert (report.after.temp_bytes, report.after.peak_bytes) == kept[:2]


def test_the_report_says_before_and_after_and_what_options_cannot_do():
    text = str(
        choose_options(
            compiler({frozenset(): Sizes(100, 1000), frozenset("a"): Sizes(5, 905)}), [choice("a")]
        )
    )
    assert "chosen: a=True; workspace 100 B before, 5 B after" in text
    assert text.endswith(NOTHING_PINS_L2)


@pytest.mark.parametrize("known", [*CHOICES, *HAZARDS], ids=lambda known: known.name)
def test_the_compiler_knows_every_option_of_the_table(known):
    check_options(known.options, compile_tiny)
    assert known.reason
    assert known.evidence


def test_unknown_options_and_wrong_values_are_refused_by_name():
    wrong = {"xla_gpu_no_such": True, "xla_gpu_enable_triton_gemm": "perhaps"}
    with pytest.raises(
        OptionError, match=r"xla_gpu_no_such=True .*xla_gpu_enable_triton_gemm='perhaps'"
    ):
        check_options(wrong, compile_tiny)


def test_another_failure_is_no_verdict_on_the_options():
    with pytest.raises(RuntimeError, match="INTERNAL"):
        check_options({"a": True}, compiler({}))


@pytest.mark.parametrize("hazard", HAZARDS, ids=lambda hazard: hazard.name)
def test_hazards_are_told_and_choices_are_none(hazard):
    (warning,) = hazards({**hazard.options, "another": 1})
    assert hazard.evidence in warning
    assert all(hazards(each.options) == () for each in CHOICES)


@needs_plugin
def test_split_k_is_found_to_inflate_a_product_s_workspace():
    def mlp(weights, x):
        return jax.nn.gelu(x @ weights[0]) @ weights[1]

    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float16)
        for shape in [(2048, 8192), (8192, 2048), (64, 2048)]
    ]
    report = choose_options(
        lambda options: compile_for(H100, mlp, [shapes[:2], shapes[2]], options=options),
        CHOICES[:1],
    )
    assert report.options == CHOICES[0].options
    assert report.before.temp_bytes == 9_437_184
    # What is left is the hidden layer itself.
    assert report.after.temp_bytes == 64 * 8192 * 2
