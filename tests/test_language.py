"""Language: docstrings name their thing, errors say what was expected and what was given."""

import ast
import re
from pathlib import Path

import pytest

from tests.support.paths import ROOT

CHECKED = ("experiments", "layerwise_jax")
PATHS = sorted(path for folder in CHECKED for path in (ROOT / folder).rglob("*.py"))
OPENINGS = re.compile(r"(What|Which|How|Where|Whether|When|Who)\b")
ERROR_WORDS = re.compile(r"\bcame\b|\bis wanted\b|\bare wanted\b")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def wrong_openings(tree: ast.Module) -> list[str]:
    """Docstrings that open with a question word."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, DOCUMENTED)]
    docstrings = [ast.get_docstring(node) or "" for node in nodes]
    return [text.splitlines()[0] for text in docstrings if OPENINGS.match(text)]


def wrong_errors(tree: ast.Module) -> list[str]:
    """Strings, docstrings left out, with words that errors avoid.

    All strings are searched, not raised ones only: an error's text may be a constant or a result of
    a helper. The parts of an f-string are searched one by one.
    """
    standing = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    strings = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and id(node) not in standing
        if isinstance(node.value, str)
    ]
    return [text for text in strings if ERROR_WORDS.search(text)]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(ROOT)))
def test_language(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert wrong_openings(tree) == []
    assert wrong_errors(tree) == []


def test_wrong_words_are_found() -> None:
    tree = ast.parse('def f(x):\n    """Whether x."""\n    raise ValueError(f"{x} came.")')
    assert wrong_openings(tree) == ["Whether x."]
    assert wrong_errors(tree) == [" came."]


def test_wrong_words_are_found_outside_of_raise() -> None:
    tree = ast.parse('def f(x):\n    """It came."""\n    return f"{x}; an int is wanted."')
    assert wrong_errors(tree) == ["; an int is wanted."]
