"""Names of JAX's primitives: those of the installed version, and recorded ones of others.

`python -m tests.support.jax_primitives` adds the installed version's names to the record.
"""

import importlib
import json
import pkgutil
from pathlib import Path

import jax
import jax._src
from jax.extend.core import Primitive

RECORD = Path(__file__).with_name("jax_primitives.json")
# Modules whose primitives occur only inside kernels, or not in users' programs.
KERNEL_LANGUAGES = ("pallas", "mosaic", "thunk", "triton", "tpu", "test")


def installed_names() -> set[str]:
    """Names of the primitives that the modules of the installed JAX define."""
    names = {"pallas_call"}
    for found in pkgutil.walk_packages(jax._src.__path__, "jax._src."):
        if any(word in found.name for word in KERNEL_LANGUAGES):
            continue
        try:
            module = importlib.import_module(found.name)
        except Exception:  # optional dependencies are missing
            continue
        names |= {value.name for value in vars(module).values() if isinstance(value, Primitive)}
    return names


def recorded_names() -> dict[str, set[str]]:
    """Names of primitives by JAX version."""
    return {version: set(names) for version, names in json.loads(RECORD.read_text()).items()}


if __name__ == "__main__":
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    record[jax.__version__] = sorted(installed_names())
    RECORD.write_text(json.dumps(record, indent=0) + "\n")
