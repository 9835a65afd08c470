"""A text that every clone has: the repository's own prose, read as bytes."""

import ast
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

PAGES = ("README.md", "BUILD.md")
SOURCES = "layerwise_jax"


def read_prose(root: Path) -> bytes:
    """The pages of the repository at `root`, then the docstrings of its package.

    Raises:
      ValueError: there is none: `root` is not a clone of the repository.
    """
    pages = [path.read_text(encoding="utf-8") for name in PAGES if (path := root / name).exists()]
    sources = sorted((root / SOURCES).rglob("*.py"))
    prose = "\n\n".join(
        [*pages, *(docstring for path in sources for docstring in docstrings(path))]
    )
    if not prose:
        raise ValueError(
            f"{root} has neither {' nor '.join(PAGES)} nor {SOURCES}/**/*.py; run this from a "
            "clone."
        )
    return prose.encode()


def docstrings(path: Path) -> Iterator[str]:
    """The docstrings of a module, its classes and its functions, in the order of a walk through the
    syntax tree.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (
            docstring := ast.get_docstring(node)
        ):
            yield docstring


def draw_batches(
    text: bytes, steps: int, batch: int, length: int, seed: int = 0
) -> NDArray[np.int32]:
    """Random windows of `text`, int32[steps, batch, length]; the same ones for the same seed.

    Raises:
      ValueError: the text is shorter than a window.
    """
    if len(text) < length:
        raise ValueError(
            f"The text has {len(text)} bytes, a window {length}; a longer text is wanted."
        )
    starts = np.random.default_rng(seed).integers(0, len(text) - length + 1, size=(steps, batch, 1))
    return np.frombuffer(text, dtype=np.uint8)[starts + np.arange(length)].astype(np.int32)
