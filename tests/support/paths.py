"""Paths of the repository, and an environment for subprocesses."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]


def fast_compile() -> dict[str, str]:
    """Environment in which XLA compiles fast and programs run slowly."""
    return {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
