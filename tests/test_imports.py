"""Architecture tests: imports point down, planning needs no JAX, one shim for JAX internals."""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "layerwise_jax"
ROOT = Path(__file__).parents[1]

# Folders and top modules in the order of processing, users' end first.
# Each imports only from those after it.
ORDER = """
    examples __init__ entry comparison build checkpoint pipeline verify host options decode train
    run measure simulate batch stage xla plan plan_text trace partition cost schedule render mesh
    processes _tables _json _arguments _jax
""".split()
WITHOUT_JAX = {
    "partition",
    "render",
    "schedule",
    "simulate",
    "cost",
    "plan",
    "plan_text",
    "_tables",
    "_json",
}
JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}

MAX_TOP_MODULES = 14
MAX_FILES = 16  # of a folder, besides __init__
MAX_LINES = 350
MAX_FUNCTION_LINES = 60

PATHS = {
    path.relative_to(ROOT / PACKAGE).with_suffix("").as_posix().replace("/", "."): path
    for path in (ROOT / PACKAGE).rglob("*.py")
}
MODULES = sorted(PATHS)
FOLDERS = sorted({module.split(".")[0] for module in MODULES if "." in module})
PLAIN_MODULES = [module for module in MODULES if module.split(".")[0] in WITHOUT_JAX]


@functools.cache
def parse(module: str) -> ast.Module:
    return ast.parse(PATHS[module].read_text(encoding="utf-8"))


def imported(module: str) -> set[str]:
    """Full names that a module imports anywhere in it: in functions and for type checkers too."""
    names = set()
    for node in ast.walk(parse(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported_modules(module: str) -> set[str]:
    """Modules of the package that a module imports; a folder stands for its `__init__`."""
    return {
        target
        for name in imported(module)
        if name.split(".")[0] == PACKAGE and (target := _module_of(name)) != module
    }


def _module_of(name: str) -> str:
    parts = name.split(".")[1:]
    for end in range(len(parts), -1, -1):
        for candidate in (".".join(parts[:end]), ".".join([*parts[:end], "__init__"])):
            if candidate in PATHS:
                return candidate
    raise AssertionError(f"{name} is no module of {PACKAGE}")


def folder_of(module: str) -> str:
    return module.split(".")[0]


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    folder = folder_of(module)
    assert folder in ORDER, f"{folder} is missing from ORDER of {Path(__file__).name}: add it"
    for other in map(folder_of, imported_modules(module)):
        assert ORDER.index(other) >= ORDER.index(folder), (
            f"{module} imports {other}, which stands above {folder}: move what they share down, "
            f"or correct ORDER of {Path(__file__).name}"
        )


def test_order_names_what_exists() -> None:
    assert set(ORDER) == {folder_of(module) for module in MODULES}


def test_no_import_cycle() -> None:
    graph = {module: imported_modules(module) for module in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other in a circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_are_small(folder: str) -> None:
    by_directory: dict[Path, int] = {}
    for path in (ROOT / PACKAGE / folder).rglob("*.py"):
        by_directory[path.parent] = by_directory.get(path.parent, 0) + (path.stem != "__init__")
    assert {d.name: n for d, n in by_directory.items() if n > MAX_FILES} == {}


def test_the_top_is_small() -> None:
    top = [module for module in MODULES if "." not in module and module != "__init__"]
    assert len(top) <= MAX_TOP_MODULES, top


@pytest.mark.parametrize("module", MODULES)
def test_only_the_shim_imports_jax_internals(module: str) -> None:
    internals = {name for name in imported(module) if name.startswith(("jax._src", "jaxlib"))}
    internals |= set(_internal_attributes(module))
    assert module == "_jax" or internals == set(), (
        f"{module} uses {internals}: export them from _jax.py"
    )


# Decisions that depend on these split a program of several processes.
ONE_PROCESS_SEES = (
    "addressable_data addressable_shards addressable_devices is_fully_addressable process_index "
    "process_count local_devices local_device_count perf_counter monotonic is_dir"
).split()


@pytest.mark.parametrize("module", MODULES)
def test_only_processes_asks_what_one_process_sees(module: str) -> None:
    asked = {n.attr for n in ast.walk(parse(module)) if isinstance(n, ast.Attribute)}
    if module != "processes":
        assert asked.isdisjoint(ONE_PROCESS_SEES), f"{module}: let processes.py answer"


def _internal_attributes(module: str) -> Iterator[str]:
    for node in ast.walk(parse(module)):
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("jax._src"):
            yield ast.unparse(node)


@pytest.mark.parametrize("module", PLAIN_MODULES)
def test_planning_names_no_jax(module: str) -> None:
    assert {name for name in imported(module) if name.split(".")[0] in JAX} == set()


def test_planning_loads_no_jax() -> None:
    names = [f"{PACKAGE}.{module}".removesuffix(".__init__") for module in PLAIN_MODULES]
    imports = "\n".join(f"import {name}" for name in names)
    script = f"import sys\n{imports}\nprint(*sorted(set(sys.modules) & {JAX!r}))"
    loaded = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert loaded.split() == [], f"importing {', '.join(names)} loads {loaded.strip()}"


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    first = function.body[0]
    is_docstring = ast.get_docstring(function) is not None
    return lines - ((first.end_lineno or first.lineno) - first.lineno + 1 if is_docstring else 0)


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_are_short(module: str) -> None:
    lines = len(PATHS[module].read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{module} has {lines} lines: it is two modules"
    functions = [
        node
        for node in ast.walk(parse(module))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    sizes = [(node.name, lines_of(node)) for node in functions]
    assert [pair for pair in sizes if pair[1] > MAX_FUNCTION_LINES] == []
