"""Command line of the experiments: where results are written, and what is refused.

Every experiment writes to `build/<experiment>` of the current folder. `--out` names another folder
outside of the source tree; `--update_results` writes to the committed results and page instead.
No module that starts JAX is imported here: flags are parsed first.
"""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from absl import app, flags
from rich.console import Console

import layerwise_jax as lw

ROOT = Path(__file__).parents[1]
# Folders of the source tree; nothing is written to them without --update_results.
SOURCES = ("docs", "experiments", "layerwise_jax", "tests")
NARROW = 80

OUT = flags.DEFINE_string("out", None, "output folder (default: build/<experiment>)")
UPDATE_RESULTS = flags.DEFINE_bool(
    "update_results", False, "write to the committed results and page of the experiment"
)


@dataclass(frozen=True)
class Output:
    """Folders of an experiment.

    Attributes:
      folder: folder that results and pictures are written to.
      committed: folder of the committed results.
      page: page whose tables are filled in.
    """

    folder: Path
    committed: Path
    page: Path

    def results(self) -> dict[str, Path]:
        """JSON files by name without suffix: those in `folder`, else the committed ones."""
        folders = (self.committed, self.folder)
        return {path.stem: path for folder in folders for path in sorted(folder.glob("*.json"))}


def output(experiment: str) -> Output:
    """The folders that the flags select; makes the output folder and copies the page into it.

    Args:
      experiment: name of the folder in `experiments/`.

    Raises:
      UsageError: `--out` is in the source tree, or is given together with `--update_results`.
    """
    home = ROOT / "experiments" / experiment
    committed, page = home / "results", home / "README.md"
    if UPDATE_RESULTS.value:
        if OUT.value is not None:
            raise app.UsageError("--update_results writes to the source tree; leave out --out.")
        committed.mkdir(exist_ok=True)
        return Output(committed, committed, page)
    folder = Path(OUT.value or Path("build") / experiment)
    if any(folder.resolve().is_relative_to(ROOT / source) for source in SOURCES):
        raise app.UsageError(
            f"--out must be outside of the source tree, got {folder}. "
            "Use --update_results to change committed results."
        )
    folder.mkdir(parents=True, exist_ok=True)
    if page.exists():
        shutil.copyfile(page, folder / page.name)
    return Output(folder, committed, folder / page.name)


def start(program: str, *options: ModuleType) -> None:
    """Parse the flags of `options`, then import the module `program` and call its `main`."""
    for module in (*options, sys.modules[__name__]):
        for flag in flags.FLAGS.get_key_flags_for_module(module):
            # absl lists the flags of the module sys.argv[0] in --helpshort.
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)

    def main(argv: Sequence[str]) -> None:
        refuse_arguments(argv)
        importlib.import_module(program).main()

    app.run(main)


def refuse_arguments(argv: Sequence[str]) -> None:
    """Refuse what the command line has besides flags.

    Raises:
      UsageError: names the arguments.
    """
    if len(argv) > 1:
        raise app.UsageError(f"arguments must be flags (--name=value), got {list(argv[1:])}")


def make_console() -> Console:
    """Console as wide as the terminal, or of 80 columns if the output is no terminal.

    Brackets are text, not markup: messages name extras such as layerwise-jax[aot].
    """
    width = None if sys.stdout.isatty() else NARROW
    return Console(width=width, soft_wrap=False, markup=False)


def use_emulated(console: Console, count: int) -> None:
    """Use `count` emulated CPU devices; exits with 2 if JAX has started with others."""
    try:
        lw.emulate_devices(count)
    except RuntimeError as error:
        console.print(f"Cannot run: {error}", style="red")
        sys.exit(2)
