"""A pipeline compiled with options of its own: chosen by what they do, checked by the compiler,
never the process's.
"""

import builtins
from collections.abc import Callable

import jax
import numpy as np
import pytest

from layerwise_jax.xla.options import CHOICES, HAZARDS, NOTHING_PINS_L2, OptionError
from layerwise_jax.xla.persisting import persisting_l2
from tests.models.zoo import CASES
from tests.support.staging import stage_case


@pytest.fixture(scope="module")
def staged_case(stage_mesh: Callable):
    case = CASES["jitted"]()
    pipeline = stage_case(case, case.fn, stage_mesh(2), 4)
    return pipeline, pipeline.place(case.params), case.inputs


def test_auto_tries_every_choice_and_keeps_the_result(staged_case):
    pipeline, staged, inputs = staged_case
    compiled = pipeline.compile(staged, *inputs)
    assert [trial.name for trial in compiled.report.trials[1:]] == [
        choice.name for choice in CHOICES
    ]
    assert compiled.report.after.temp_bytes <= compiled.report.before.temp_bytes
    assert compiled.report.after.peak_bytes <= compiled.report.before.peak_bytes
    assert NOTHING_PINS_L2 in str(compiled)
    np.testing.assert_array_equal(compiled(staged, *inputs), jax.jit(pipeline)(staged, *inputs))


def test_shapes_are_enough_to_choose(staged_case):
    pipeline, staged, inputs = staged_case
    shapes = jax.eval_shape(lambda *x: x, staged, *inputs)
    assert pipeline.compile(*shapes).report.before.peak_bytes > 0


def test_what_the_compiler_does_not_know_is_refused(staged_case):
    pipeline, staged, inputs = staged_case
    with pytest.raises(OptionError, match="xla_gpu_pin_weights_in_l2"):
        pipeline.compile(staged, *inputs, options={"xla_gpu_pin_weights_in_l2": True})


def test_hazards_are_named(staged_case):
    pipeline, staged, inputs = staged_case
    compiled = pipeline.compile(staged, *inputs, options=HAZARDS[0].options)
    assert len(compiled.warnings) == 1
    assert HAZARDS[0].name in compiled.warnings[0]
    assert pipeline.compile(staged, *inputs, options=None).warnings == ()


def test_the_set_aside_says_what_it_needs(monkeypatch: pytest.MonkeyPatch):
    real = builtins.__import__

    def without_cuda(name: str, *args, **kwargs):
        if name.startswith("cuda"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_cuda)
    with pytest.raises(ImportError, match=r"layerwise-jax\[l2\]"), persisting_l2(2**20):
        pass
