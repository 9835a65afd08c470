"""Packaging: the wheel and the sdist are complete, and the installed wheel runs by itself.

The wheel is installed into a new environment that sees the packages of the test environment, so
nothing is downloaded. Programs run from an empty folder, away from the checkout.
"""

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

import layerwise_jax as lw
from tests.support.paths import ROOT, fast_compile

README = (ROOT / "README.md").read_text(encoding="utf-8")
PACKAGE = ROOT / "layerwise_jax"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Distributions whose modules have another name, and modules that another dependency brings.
MODULES_OF = {
    "absl-py": {"absl"},
    "orbax-checkpoint": {"orbax"},
    "cuda-bindings": {"cuda"},
    "jax": {"jax", "jaxlib"},
}


@dataclass(frozen=True)
class Installed:
    """A new environment with the wheel, and an empty folder to run programs in."""

    python: Path
    folder: Path

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run Python in the empty folder; fails the test if the program fails."""
        environment = fast_compile()
        environment.pop("PYTHONPATH", None)
        ran = subprocess.run(
            [self.python, *arguments],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a wheel and an sdist of the checkout."""
    folder = tmp_path_factory.mktemp("dist")
    _build(ROOT, folder, "wheel", "sdist")
    return folder


@pytest.fixture(scope="module")
def installed(distributions: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel in a new environment, which finds dependencies in the test environment."""
    root = tmp_path_factory.mktemp("environment")
    venv.EnvBuilder(symlinks=True).create(root)
    python = root / "bin" / "python"
    script = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(_output([python, "-c", script]).strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    wheel = next(distributions.glob("*.whl"))
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    options = ["--quiet", "--no-index", "--no-deps", "--disable-pip-version-check"]
    _output([*pip, "install", *options, str(wheel)])
    return Installed(python, tmp_path_factory.mktemp("empty"))


def test_wheel_has_the_package_and_nothing_else(distributions: Path) -> None:
    names = _wheel_files(next(distributions.glob("*.whl")))
    assert {name.split("/")[0] for name in names} == {
        "layerwise_jax",
        f"layerwise_jax-{lw.__version__}.dist-info",
    }
    for needed in ("py.typed", "examples/text.txt"):
        assert f"layerwise_jax/{needed}" in names
    assert f"layerwise_jax-{lw.__version__}.dist-info/licenses/LICENSE" in names
    sources = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources


def test_sdist_builds_the_same_wheel(distributions: Path, tmp_path: Path) -> None:
    with tarfile.open(next(distributions.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    source = tmp_path / f"layerwise_jax-{lw.__version__}"
    _build(source, tmp_path / "dist", "wheel")
    rebuilt = next((tmp_path / "dist").glob("*.whl"))
    assert _wheel_files(rebuilt) == _wheel_files(next(distributions.glob("*.whl")))
    for page in ("README.md", "BUILD.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile"):
        assert (source / page).exists()


def test_every_import_is_a_declared_dependency() -> None:
    extras = PROJECT["optional-dependencies"]
    declared = set(map(_distribution, PROJECT["dependencies"]))
    optional = {_distribution(line) for name in extras if name != "test" for line in extras[name]}
    allowed = set().union(*map(_modules, declared | optional))
    required = set().union(*map(_modules, declared))
    always, anywhere = set(), set()
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        anywhere |= _imported(list(ast.walk(tree)))
        # Modules that are imported with the package's own; a function may import an extra.
        if path.name != "pictures.py":
            always |= _imported(tree.body)
    own = {"layerwise_jax", *sys.stdlib_module_names}
    assert anywhere - own <= allowed
    assert always - own <= required


def test_version_is_that_of_the_distribution(installed: Installed) -> None:
    script = (
        "import importlib.metadata, layerwise_jax as lw\n"
        "print(lw.__version__, importlib.metadata.version('layerwise-jax'), lw.__file__)"
    )
    version, distribution, file = installed.run("-c", script).stdout.split()
    assert version == distribution == lw.__version__
    assert not Path(file).is_relative_to(ROOT)


def test_readme_runs_from_the_wheel_and_prints_its_plan(installed: Installed) -> None:
    ran = installed.run("-c", "\n".join(_blocks("python")))
    (printed,) = _blocks("text")
    assert _stable_cells(ran.stdout) == _stable_cells(printed)


def test_quickstart_runs_from_the_wheel(installed: Installed) -> None:
    quickstart = ("-m", "layerwise_jax.examples.quickstart")
    ran = installed.run(*quickstart, "--depth=2", "--stages=2", "--steps=2")
    assert "Largest relative difference" in ran.stdout
    assert (installed.folder / "build" / "quickstart.png").stat().st_size > 10_000


def _build(source: Path, folder: Path, *targets: str) -> None:
    flags = [flag for target in targets for flag in ("-t", target)]
    _output([sys.executable, "-m", "hatchling", "build", *flags, "-d", str(folder)], cwd=source)


def _output(command: Sequence[str | Path], cwd: Path | None = None) -> str:
    ran = subprocess.run(command, cwd=cwd, env=dict(os.environ), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def _wheel_files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def _distribution(requirement: str) -> str:
    return re.split(r"[\[<>=; ]", requirement)[0]


def _modules(distribution: str) -> set[str]:
    return MODULES_OF.get(distribution, {distribution.replace("-", "_")})


def _imported(nodes: Sequence[ast.AST]) -> set[str]:
    """Top-level names of the modules that these statements import."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def _stable_cells(text: str) -> list[list[str]]:
    """Rows of a printed plan: stage, layers, weights, activations and bytes sent.

    The other columns depend on what the compiler allocates.
    """
    rows: list[list[str]] = []
    for line in text.splitlines():
        cells = re.match(r" *(\d+) (.*?) +(\S+) +(\S+) +\S+ +\S+ +\S+ \S+ \d+% +(\S+)$", line)
        if cells:
            rows.append(list(cells.groups()))
        elif rows and re.match(r" {6}\S", line):  # layers that are folded to several lines
            rows[-1][1] += f" {line.strip()}"
    assert rows
    return rows
