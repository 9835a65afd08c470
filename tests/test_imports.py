"""The house keeps its floors: imports point down, planning needs no JAX, one door to JAX's internals, small rooms."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = "layerwise_jax"
ROOT = Path(__file__).parents[1]

# A module imports from the floors below its own and, on its own floor, from those before it in its flight of stairs.
FLOORS = {
    3: ["__init__"],
    2: [
        (
            "measure microbatch optimizer_trace optimizer_rows optimizer_run optimizer_state optimizer train_step loop "
            "on_device forward residuals linearize stash stage_vjp training interleaved sampling batch_roles "
            "batch_scale batch_single batch_pairs batch_derivatives batch_elementwise batch_shapes batch_products "
            "batch_attention batch_indexing batch_draws batch_control batch_walk batch_outputs outputs batching "
            "inner_sharding state_order step_program cache_rows step_rows ring_message ring_loop ring_state "
            "ring_program prefill generation ring compiling pipeline checkpoint build detect entry decode "
            "comparison_advice comparison comparison_trace"
        ),
    ],
    1: [
        (
            "modules checkpoint_files program stacked_rows flatten structure anchors layer_search layers "
            "optimizer_program inputs stages alignment wiring slot_names placement slots refusals"
        ),
        "report plan verdict",
        (
            "partition_checks partition_problem partition_result partition_stage partition_sweep partition_certificate "
            "partition_even partition_search partition_plan partition_bottleneck partition_greedy partition_objective "
            "partition_measured partition simulate_work simulate_calibration simulate_stage simulate_strategy "
            "simulate_training simulate_prediction simulate simulate_records simulate_fit"
        ),
        "timeline",
    ],
    0: [
        "_jax",
        "schedule schedule_check schedule_generators schedule_simulate schedule_tables",
        "arguments",
        "cost json_fields device_spec devices gpu_target buffers_wire buffers flops aot xla_options persisting",
    ],
}
FLIGHTS = [(floor, flight.split()) for floor, flights in FLOORS.items() for flight in flights]

# Modules that plan, by the first word of their names: plain numbers in and out.
PLANNING = {"partition", "simulate", "schedule", "cost", "devices", "buffers"}
JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}

MAX_LINES = 350
MAX_FUNCTION_LINES = 60

PATHS = {path.relative_to(ROOT / PACKAGE).with_suffix("").as_posix(): path for path in (ROOT / PACKAGE).rglob("*.py")}
MODULES = sorted(PATHS)
PLANNING_MODULES = [name for name in MODULES if name.split("_")[0] in PLANNING]


@functools.cache
def parse(module: str) -> ast.Module:
    return ast.parse(PATHS[module].read_text(encoding="utf-8"))


def imported(module: str) -> set[str]:
    """The full names that a module imports anywhere in it, in functions and for type checkers too."""
    names = set()
    for node in ast.walk(parse(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = ".".join([PACKAGE] * (node.level > 0) + [node.module] * (node.module is not None))
            names |= {f"{source}.{alias.name}" for alias in node.names}
    return names


def imported_modules(module: str) -> set[str]:
    """The modules of the package that a module imports."""
    inside = [name.split(".") for name in imported(module) if name.split(".")[0] == PACKAGE]
    return {name[1] if len(name) > 2 or name[-1] in PATHS else "__init__" for name in inside}


def place(module: str) -> tuple[int, list[str]]:
    """The floor of a module and those before it in its flight; fails for one that FLOORS leaves out or names twice."""
    places = [(floor, flight[: flight.index(module)]) for floor, flight in FLIGHTS if module in flight]
    assert places, f"{module} is missing from FLOORS of {Path(__file__).name}: add it to the floor where it belongs"
    assert len(places) == 1, f"{module} stands in {len(places)} places of FLOORS: leave it in one"
    return places[0]


@pytest.mark.parametrize("module", sorted({*MODULES, *(module for _, flight in FLIGHTS for module in flight)}))
def test_every_module_has_one_place(module: str):
    assert module in PATHS, f"{module} is gone from the package: take it out of FLOORS of {Path(__file__).name}"
    assert module not in place(module)[1]


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str):
    floor, before = place(module)
    for other in imported_modules(module) - {module}:
        assert place(other)[0] < floor or other in before, (
            f"{module} (floor {floor}) imports {other} (floor {place(other)[0]}), neither on a floor below nor "
            f"before it in its flight: move what they share down, or mend FLOORS of {Path(__file__).name}"
        )


@pytest.mark.parametrize("module", MODULES)
def test_only_the_door_imports_jax_internals(module: str):
    internals = {name for name in imported(module) if name.startswith(("jax._src", "jaxlib"))}
    internals |= {ast.unparse(node) for node in ast.walk(parse(module)) if _is_internal_attribute(node)}
    assert module == "_jax" or internals == set(), f"{module} reaches into {internals}: let _jax.py hand it out"


def _is_internal_attribute(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and ast.unparse(node).startswith("jax._src")


@pytest.mark.parametrize("module", PLANNING_MODULES)
def test_planning_names_no_jax(module: str):
    assert {name for name in imported(module) if name.split(".")[0] in JAX} == set()


def test_planning_loads_no_jax():
    imports = "\n".join(f"import {PACKAGE}.{module}" for module in PLANNING_MODULES)
    script = f"import sys\n{imports}\nprint(*sorted(set(sys.modules) & {JAX!r}))"
    loaded = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert loaded.split() == [], f"importing {', '.join(PLANNING_MODULES)} loads {loaded.strip()}"


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The lines of a function but for its docstring."""
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    first = function.body[0]
    is_docstring = ast.get_docstring(function) is not None
    return lines - ((first.end_lineno or first.lineno) - first.lineno + 1 if is_docstring else 0)


@pytest.mark.parametrize("module", MODULES)
def test_rooms_are_small(module: str):
    lines = len(PATHS[module].read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{module} has {lines} lines: it is two modules"
    functions = [node for node in ast.walk(parse(module)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    sizes = [(node.name, lines_of(node)) for node in functions]
    assert [pair for pair in sizes if pair[1] > MAX_FUNCTION_LINES] == []
