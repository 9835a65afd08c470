"""Public names load in any order."""

import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import layerwise_jax as lw


def test_every_public_name_loads_and_is_no_module() -> None:
    assert lw.__all__
    for name in lw.__all__:
        assert not isinstance(getattr(lw, name), ModuleType)
    namespaces = {name for name in dir(lw) if isinstance(getattr(lw, name), ModuleType)}
    assert set(dir(lw)) - namespaces == set(lw.__all__)


def test_what_is_not_public_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lw.nothing  # noqa: B018


@pytest.mark.parametrize("first", ["stage_mesh", "layerwise", "Partition"])
def test_the_function_layerwise_is_not_its_module(first: str) -> None:
    """No module of the package has the function's name; in a process that has asked for nothing
    yet.
    """
    program = (
        f"import layerwise_jax as lw; lw.{first}; assert callable(lw.layerwise) and "
        "callable(lw.layerwise)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1], check=True)


def test_public_functions_say_what_they_take_and_raise() -> None:
    for name in lw.__all__:
        member = getattr(lw, name)
        if inspect.isfunction(member):
            assert inspect.getdoc(member)
            assert member.__annotations__
