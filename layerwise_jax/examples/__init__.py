"""Example models of the README and the quickstart: small Flax models and a training loss.

Names are loaded on first use, so that `import layerwise_jax.examples` does not import Flax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layerwise_jax.examples.gpt import GPT, next_token_loss
    from layerwise_jax.examples.moe import MixtureOfExperts
    from layerwise_jax.examples.pictures import COLOURS, draw_bars
    from layerwise_jax.examples.resnet import ResNet
    from layerwise_jax.examples.text import draw_batches, read_text

_HOMES = {
    "gpt": ("GPT", "next_token_loss"),
    "moe": ("MixtureOfExperts",),
    "resnet": ("ResNet",),
    "pictures": ("COLOURS", "draw_bars"),
    "text": ("draw_batches", "read_text"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
# Modules whose parts (blocks, experts, flags) are public too.
_MODULES = ("gpt", "moe", "resnet", "quickstart")

__all__ = [
    "GPT",
    "MixtureOfExperts",
    "ResNet",
    "next_token_loss",
    "COLOURS",
    "draw_bars",
    "draw_batches",
    "read_text",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES})
