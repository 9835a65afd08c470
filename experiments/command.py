"""What the experiments' binaries have in common: flags are all they take, and emulated devices are
asked for first.
"""

import sys
from collections.abc import Sequence

from absl import app
from rich.console import Console

import layerwise_jax as lw


def refuse_words(argv: Sequence[str]) -> None:
    """Refuse what is left of a command line besides flags.

    Raises:
      UsageError: naming it.
    """
    if len(argv) > 1:
        raise app.UsageError(
            f"nothing is taken besides flags, which begin with --; came {list(argv[1:])}"
        )


def use_emulated(console: Console, count: int) -> None:
    """So many emulated CPU devices; ends the program where JAX has others already."""
    try:
        lw.emulate_devices(count)
    except RuntimeError as error:
        console.print(f"Cannot run: {error}", style="red")
        sys.exit(2)
