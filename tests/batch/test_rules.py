"""Every rule of a primitive is held against the primitive itself, whole and in parts."""

import numpy as np
import pytest

from layerwise_jax.batch import interpreter
from layerwise_jax.batch.rules import bodies, draws, elementwise
from tests.support.primitive_cases import NOT_RUN, all_cases
from tests.support.rule_check import check_case, variants

CASES = all_cases()
SKIPPED = {name for names in NOT_RUN.values() for name in names.split()}


def test_every_primitive_with_a_rule_is_covered() -> None:
    with_rule = {*interpreter.RULES, *bodies.RULES, *draws.PRIMITIVES}
    assert set(CASES) | SKIPPED == with_rule
    assert not set(CASES) & SKIPPED


@pytest.mark.parametrize("name", CASES)
def test_rule(name: str) -> None:
    """One case of each primitive, in parts of two examples; some case must be accepted."""
    accepted = False
    for case in CASES[name]:
        outcome = check_case(case)
        if name in outcome.primitives and outcome.accepted:
            accepted = True
            break
    assert accepted, f"no case of {name} is accepted"


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("name", CASES)
def test_rule_of_every_operand(name: str, size: int) -> None:
    for number, case in enumerate(CASES[name]):
        for other in variants(case):
            check_case(other, size, parts=2 if size > 1 else 3, seed=number)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("sort", elementwise.RULES["sin"]),
        ("cumsum", elementwise.RULES["neg"]),
        ("reduce_max", elementwise.RULES["sin"]),
        ("tanh", elementwise.RULES["neg"]),
        ("div", elementwise.RULES["mul"]),
        ("mul", elementwise.RULES["add"]),
        ("rev", elementwise.RULES["neg"]),
    ],
)
def test_a_wrong_rule_is_caught(name: str, wrong: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(interpreter.RULES, name, wrong)
    caught = (AssertionError, IndexError, np.exceptions.AxisError)
    with pytest.raises(caught):
        check_all(name)


def check_all(name: str) -> None:
    for case in CASES[name]:
        for other in variants(case):
            check_case(other)
