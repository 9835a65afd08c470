"""Experiments use the public API: `layerwise_jax` or one of its namespaces, nothing below."""

import ast
import importlib
from pathlib import Path

import pytest

import layerwise_jax as lw
from tests.support.paths import ROOT

PATHS = sorted((ROOT / "experiments").rglob("*.py"))


def deep_imports(source: str) -> list[str]:
    """Imports of the package that leave its public names."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("layerwise_jax.")]
            found += names
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("layerwise_jax"):
            found += [
                f"{node.module}.{alias.name}"
                for alias in node.names
                if not is_public(node.module or "", alias.name)
            ]
    return found


def is_public(module: str, name: str) -> bool:
    """A name of the package or of a namespace that `dir(lw)` lists."""
    package, *namespaces = module.split(".")
    if package != "layerwise_jax" or len(namespaces) > 1:
        return False
    if namespaces and (namespaces[0] in lw.__all__ or namespaces[0] not in dir(lw)):
        return False
    return name in dir(importlib.import_module(module)) and not name.startswith("_")


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(ROOT)))
def test_experiments_import_public_names(path: Path) -> None:
    assert deep_imports(path.read_text(encoding="utf-8")) == [], (
        "import the name from layerwise_jax or its namespace; add it to the namespace if it is new"
    )


@pytest.mark.parametrize(
    ("line", "deep"),
    [
        ("import layerwise_jax as lw", False),
        ("from layerwise_jax import Pipeline", False),
        ("from layerwise_jax.partition import solve", False),
        ("from layerwise_jax.examples import GPT", False),
        ("from layerwise_jax.mesh import STAGE", False),
        ("import layerwise_jax.partition", True),
        ("from layerwise_jax.partition.solver import solve", True),
        ("from layerwise_jax.pipeline import Pipeline", True),
        ("from layerwise_jax._jax import bind", True),
        ("from layerwise_jax import nothing", True),
    ],
)
def test_deep_imports_are_found(line: str, deep: bool) -> None:
    assert bool(deep_imports(line)) == deep
